"""Basic trackers: one that does nothing, and one that forwards to several others."""

from collections.abc import Sequence
from pathlib import Path

from metaformer.interfaces import Row, Tracker


class NullTracker:
    """A tracker that does nothing."""

    def metrics(self, row: Row) -> None: ...

    def message(self, text: str) -> None: ...

    def progress(self, activity: str, done: int, total: int) -> None: ...

    def picture(self, name: str, file: Path) -> None: ...

    def checkpoint(self, folder: Path, aliases: list[str]) -> None: ...

    def close(self, failed: bool) -> None: ...


class FanOut:
    """A tracker that forwards every call to several trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def metrics(self, row: Row) -> None:
        for tracker in self._trackers:
            tracker.metrics(row)

    def message(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.message(text)

    def progress(self, activity: str, done: int, total: int) -> None:
        for tracker in self._trackers:
            tracker.progress(activity, done, total)

    def picture(self, name: str, file: Path) -> None:
        for tracker in self._trackers:
            tracker.picture(name, file)

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        for tracker in self._trackers:
            tracker.checkpoint(folder, aliases)

    def close(self, failed: bool) -> None:
        for tracker in self._trackers:
            tracker.close(failed)
