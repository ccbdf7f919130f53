"""Configuration of the training loop."""

from dataclasses import dataclass, field

from metaformer.errors import UserError, check_at_least
from metaformer.training.checkpoint import CheckpointConfig
from metaformer.training.schedule import ScheduleConfig


@dataclass
class GuardConfig:
    """When to stop a run that no longer makes progress."""

    max_skipped_steps: int = 20  # consecutive steps whose gradients were not finite
    stall_seconds: int = 600  # without a step, a validation batch or a save on a rank: write stacks, end the job
    compare_ranks_every_steps: int | None = 1000  # check that all ranks have the same weights
    max_starts_without_progress: int = 5  # consecutive starts that crashed before the next checkpoint

    def __post_init__(self) -> None:
        check_at_least(1, self, *self.__dataclass_fields__, prefix="guards.")


@dataclass
class LoopConfig:
    """How long to train, in which batches, and how often to log, save and check."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    epochs: int = 300  # the schedule's cool-down epochs are added to these
    global_batch_size: int = 1024  # images of an optimizer step, over all ranks and accumulation steps
    accumulation_steps: int = 1
    clip_grad_norm: float | None = None
    log_every_steps: int = 50
    max_steps: int | None = None  # stop after this many steps in total, for trials

    def __post_init__(self) -> None:
        check_at_least(1, self, "epochs", "global_batch_size", "accumulation_steps", "log_every_steps", "max_steps")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise UserError(f"clip_grad_norm={self.clip_grad_norm}: must be positive, or null for none")

    @property
    def total_epochs(self) -> int:
        """Epochs with those of the cool-down."""
        return self.epochs + self.schedule.cooldown_epochs

    def rank_batch_size(self, world_size: int) -> int:
        """Return the images of one rank in one forward pass."""
        return self.global_batch_size // world_size // self.accumulation_steps
