"""What the components pass to each other: batches of images, and what is reported about a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Row = dict[str, Any]


class Waiting(NamedTuple):
    """Seconds that the training process waited for data, by the loader's stage that it waited for."""

    read: float = 0.0  # reading files
    decode: float = 0.0
    augment: float = 0.0  # resizing, flipping and RandAugment
    copy: float = 0.0  # from the worker that made a batch to the training process and its device

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Batch(NamedTuple):
    """One rank's batch, on the device.

    Attributes:
        images: float32 [B, 3, S, S], normalised; in training also augmented.
        targets: int64 labels [B] in evaluation, float32 soft targets [B, classes] in training.
        waited: how long the consumer waited for the batch, and for what.
    """

    images: Tensor
    targets: Tensor
    waited: Waiting = Waiting()


class BatchSource(Protocol):
    """Where batches come from."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Return this rank's batches from position `first` to the end of an epoch; epochs count from 0."""

    @property
    def rounds_per_epoch(self) -> int:
        """Batches of the rank that has the most."""


class Tracker(Protocol):
    """Receives what is worth recording about a run; only rank 0's tracker does something."""

    def metrics(self, row: Row) -> None:
        """Record a row with `kind` ("train", "validation" or "final"), `epoch`, `step`, `samples` and figures."""

    def message(self, text: str) -> None:
        """Show a line to people."""

    def progress(self, activity: str, done: int, total: int) -> None:
        """Note how much of an activity, a phase of `goodput`, is done; called for each step and validation batch."""

    def picture(self, name: str, file: Path) -> None:
        """Record an image file of the run."""

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """Record a checkpoint that is worth keeping elsewhere too."""

    def close(self, failed: bool) -> None:
        """End the run."""
