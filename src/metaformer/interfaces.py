"""Interfaces between the components: batches of images, and trackers of a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Row = dict[str, Any]


class Waiting(NamedTuple):
    """Seconds that the training process waited for data, by stage of loading."""

    read: float = 0.0  # reading files
    decode: float = 0.0
    augment: float = 0.0  # resizing, flipping and RandAugment
    copy: float = 0.0  # from the worker to the training process, and to the device

    @property
    def total(self) -> float:
        """Sum of all stages."""
        return sum(self)


class Batch(NamedTuple):
    """One rank's batch, on the device.

    Attributes:
        images: float32 [B, 3, S, S], normalised; in training also augmented.
        targets: int64 labels [B] in evaluation, float32 soft targets [B, classes] in training.
        waited: how long the consumer waited for the batch, by stage.
    """

    images: Tensor
    targets: Tensor
    waited: Waiting = Waiting()


class BatchSource(Protocol):
    """Interface of a source of batches, which training and evaluation read."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Return this rank's batches from position `first` to the end of an epoch; epochs count from 0."""

    @property
    def rounds_per_epoch(self) -> int:
        """Number of batches of the rank that has the most."""


class Tracker(Protocol):
    """Interface of the trackers that record a run. Only rank 0 has one that does something."""

    def metrics(self, row: Row) -> None:
        """Record a row with `kind` ("train", "validation" or "final"), `epoch`, `step`, `samples` and measurements."""

    def message(self, text: str) -> None:
        """Show a message to the user."""

    def progress(self, activity: str, done: int, total: int) -> None:
        """Report the progress of an activity, a phase of `goodput`; called for each step and validation batch."""

    def picture(self, name: str, file: Path) -> None:
        """Record an image file of the run."""

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """Record a checkpoint, for example by uploading it."""

    def close(self, failed: bool) -> None:
        """End the run."""
