"""What the training loop needs of its surroundings: where batches come from, who is told, how long, how often."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from metaformer.training.checkpoint import CheckpointConfig
from metaformer.training.guards import GuardConfig


class SoftBatch(Protocol):
    """One rank's batch, on the device."""

    @property
    def images(self) -> Tensor:
        """float32 [B, 3, S, S], normalised and augmented."""

    @property
    def targets(self) -> Tensor:
        """float32 [B, classes]."""

    @property
    def waited(self) -> float:
        """Seconds that the loop waited for it."""


class TrainingData(Protocol):
    """Where the batches come from."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[SoftBatch]:
        """This rank's batches from position `first` to the epoch's end; epochs count from 0."""


class Tracker(Protocol):
    """Where rows of metrics and checkpoints go."""

    def metrics(self, row: dict[str, Any]) -> None:
        """One row; its `kind` is "train", "validation" or "final"."""

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """A checkpoint worth keeping elsewhere too."""

    def message(self, text: str) -> None:
        """A line for people."""


# A model, and what to ask before each batch whether to stop, in; top1, top5, loss, images and quarantined out. Raises
# Interrupted on all ranks if one has stopped.
Validate = Callable[[nn.Module, Callable[[], bool]], dict[str, Any]]


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
