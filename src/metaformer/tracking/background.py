"""A tracker that may be slow or stuck, kept out of training's way."""

import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from metaformer.tracking.tracker import Row, Tracker

QUEUE_LENGTH = 10_000  # calls that wait at most: days of log rows
# When training was interrupted or failed: less than the other ranks wait for rank 0 to say why.
CLOSE_SECONDS_OF_FAILED = 4.0

Call = Callable[[Tracker], None]


class BackgroundTracker:
    """Hands every call to a thread, which makes the tracker first and then tells it in order.

    What does not fit in the queue, and what waits when the time at the end is over, is counted and said; the run's own
    files have it all the same.

    Args:
        name: for warnings.
        make: makes the tracker; it may take long, and fail.
        close_seconds: for what waits, when training has ended.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], close_seconds: float) -> None:
        self._name, self._make, self._close_seconds = name, make, close_seconds
        self._calls: queue.Queue[Call | None] = queue.Queue(QUEUE_LENGTH)
        self._lost = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def metrics(self, row: Row) -> None:
        self._hand_over(lambda tracker: tracker.metrics(row))

    def message(self, text: str) -> None:
        self._hand_over(lambda tracker: tracker.message(text))

    def picture(self, name: str, file: Path) -> None:
        self._hand_over(lambda tracker: tracker.picture(name, file))

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        self._hand_over(lambda tracker: tracker.checkpoint(folder, aliases))

    def close(self, failed: bool) -> None:
        self._hand_over(lambda tracker: tracker.close(failed))
        self._hand_over(None)
        self._thread.join(min(CLOSE_SECONDS_OF_FAILED, self._close_seconds) if failed else self._close_seconds)
        if self._thread.is_alive() or self._lost:
            waiting = max(0, self._calls.qsize() - 2)  # without the two that close it
            self._warn(
                f"{self._lost + waiting} rows or files did not reach it (it was too slow); the run folder has all"
            )

    def _hand_over(self, call: Call | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._lost += 1

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # of a service that training does not need
            self._warn(f"failed and is off from here; training goes on ({' '.join(str(error).split())})")
            while self._calls.get() is not None:
                pass

    def _warn(self, text: str) -> None:
        print(f"warning: {self._name}: {text}", file=sys.stderr, flush=True)
