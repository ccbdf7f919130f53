"""What a tracker is, the one that does nothing, and the one that tells several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


class Tracker(Protocol):
    """Receives everything that is worth keeping of a run; rank 0's do something, the others' nothing."""

    def metrics(self, row: Row) -> None:
        """A row with `kind` ("train", "validation", "final"), `epoch`, `step`, `samples` and figures."""

    def message(self, text: str) -> None:
        """A line for people."""

    def picture(self, name: str, file: Path) -> None:
        """An image file of the run."""

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """A checkpoint worth keeping elsewhere too."""

    def close(self, failed: bool) -> None:
        """The run ends."""


class NullTracker:
    """A tracker that does nothing."""

    def metrics(self, row: Row) -> None: ...

    def message(self, text: str) -> None: ...

    def picture(self, name: str, file: Path) -> None: ...

    def checkpoint(self, folder: Path, aliases: list[str]) -> None: ...

    def close(self, failed: bool) -> None: ...


class FanOut:
    """A tracker that tells several, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def metrics(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.metrics(row)

    def message(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.message(text)

    def picture(self, name: str, file: Path) -> None:
        for tracker in self._trackers:
            tracker.picture(name, file)

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        for tracker in self._trackers:
            tracker.checkpoint(folder, aliases)

    def close(self, failed: bool) -> None:
        for tracker in self._trackers:
            tracker.close(failed)
