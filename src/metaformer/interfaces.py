"""What the components pass to each other: batches of images, and what is reported about a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Row = dict[str, Any]


class Batch(NamedTuple):
    """One rank's batch, on the device.

    Attributes:
        images: float32 [B, 3, S, S], normalised; in training also augmented.
        targets: int64 labels [B] in evaluation, float32 soft targets [B, classes] in training.
        waited: seconds that the consumer waited for the loader.
    """

    images: Tensor
    targets: Tensor
    waited: float = 0.0


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

    def picture(self, name: str, file: Path) -> None:
        """Record an image file of the run."""

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """Record a checkpoint that is worth keeping elsewhere too."""

    def close(self, failed: bool) -> None:
        """End the run."""
