"""What watches over a run: its settings, and the error that ends one that cannot go on."""

from dataclasses import dataclass

from metaformer.errors import UserError
from metaformer.training.checkpoint import CheckpointConfig


@dataclass
class GuardConfig:
    """When a run is stopped for its own good."""

    max_skipped_steps: int = 20  # in a row, whose gradients were not finite
    stall_seconds: int = 600  # without a step, a validation batch or a save on a rank: stacks are written, the job ends
    compare_ranks_every_steps: int | None = 1000  # whether all ranks have the same weights
    max_starts_without_progress: int = 5  # in a row that crashed before the next checkpoint

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"guards.{name}={value}: must be at least 1")


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often."""

    epochs: int  # in all, cool-down included
    steps_per_epoch: int
    accumulation_steps: int
    global_batch_size: int
    seed: int
    log_every_steps: int
    checkpoint: CheckpointConfig
    guards: GuardConfig
    clip_grad_norm: float | None = None
    max_steps: int | None = None  # stop early after this many steps in all
