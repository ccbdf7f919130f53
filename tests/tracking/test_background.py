"""A tracker that is slow, stuck or broken does not hold up training."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from metaformer.tracking import background
from metaformer.tracking.background import BackgroundTracker
from metaformer.tracking.tracker import NullTracker


class Gate(NullTracker):
    """Remembers its calls, once it is let go."""

    def __init__(self, opens: bool = False) -> None:
        self.opened = threading.Event()
        self.calls: list[Any] = []
        if opens:
            self.opened.set()

    def metrics(self, row: dict[str, Any]) -> None:
        self.opened.wait(30)
        self.calls.append(row["step"])

    def message(self, text: str) -> None:
        self.calls.append(text)

    def picture(self, name: str, file: Path) -> None:
        self.calls.append((name, file))

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        self.calls.append((folder, aliases))

    def close(self, failed: bool) -> None:
        self.calls.append(failed)


@pytest.mark.parametrize("failed", [True, False])
def test_everything_arrives_in_order(failed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """All kinds of calls, from one thread to another, and nothing is said."""
    gate = Gate(opens=True)
    tracker = BackgroundTracker("service", lambda: gate, 60)
    tracker.metrics({"step": 1})
    tracker.message("text")
    tracker.picture("name", Path("file"))
    tracker.checkpoint(Path("folder"), ["best"])
    tracker.metrics({"step": 2})
    tracker.close(failed)
    assert gate.calls == [1, "text", ("name", Path("file")), (Path("folder"), ["best"]), 2, failed]
    assert capfd.readouterr().err == ""


def test_a_slow_tracker_holds_nobody_up() -> None:
    """Neither making it nor a call that is stuck costs the caller time; all arrives once it goes on."""
    gate, made = Gate(), threading.Event()

    def make() -> Gate:
        made.wait(30)
        return gate

    began = time.monotonic()
    tracker = BackgroundTracker("service", make, 60)
    for step in range(1000):
        tracker.metrics({"step": step})
    made.set()
    for step in range(1000, 2000):
        tracker.metrics({"step": step})
    assert time.monotonic() - began < 5
    assert len(gate.calls) == 0
    gate.opened.set()
    tracker.close(failed=False)
    assert gate.calls == [*range(2000), False]


@pytest.mark.parametrize("breaks", ["when made", "when told"])
def test_a_broken_tracker_is_off(breaks: str, capfd: pytest.CaptureFixture[str]) -> None:
    """An error, at the beginning or later: one warning in one line, and no more of it, at the end either."""

    class Broken(NullTracker):
        def metrics(self, row: dict[str, Any]) -> None:
            raise ValueError("a\nreason")

    def make() -> Broken:
        if breaks == "when made":
            raise ValueError("a\nreason")
        return Broken()

    tracker = BackgroundTracker("service", make, 60)
    for step in range(3):
        tracker.metrics({"step": step})
    began = time.monotonic()
    tracker.close(failed=False)
    assert time.monotonic() - began < 5
    expected = "warning: service: failed and is off from here; training goes on (a reason)\n"
    assert capfd.readouterr().err == expected


@pytest.mark.parametrize("failed", [True, False])
def test_a_stuck_tracker_is_left_behind(
    failed: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the end it has its time, less where the run failed; then what did not arrive is counted, and the run ends."""
    monkeypatch.setattr(background, "CLOSE_SECONDS_OF_FAILED", 0.1)
    gate = Gate()
    tracker = BackgroundTracker("service", lambda: gate, 0.6)
    for step in range(4):
        tracker.metrics({"step": step})
    while tracker._calls.qsize() > 3:  # the thread has the first in its hands
        time.sleep(0.01)
    began = time.monotonic()
    tracker.close(failed)
    seconds = time.monotonic() - began
    assert (0.1 if failed else 0.6) <= seconds < (0.5 if failed else 5)
    assert "warning: service: 3 rows or files did not reach it" in capfd.readouterr().err
    gate.opened.set()


def test_a_full_queue_drops_what_is_new(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody waits for room; how many were dropped is said at the end."""
    monkeypatch.setattr(background, "QUEUE_LENGTH", 5)
    gate = Gate()
    tracker = BackgroundTracker("service", lambda: gate, 60)
    tracker.metrics({"step": 0})
    while tracker._calls.qsize():
        time.sleep(0.01)
    for step in range(1, 9):
        tracker.metrics({"step": step})
    gate.opened.set()
    while tracker._calls.qsize():
        time.sleep(0.01)
    tracker.close(failed=False)
    assert gate.calls == [0, 1, 2, 3, 4, 5, False]
    assert "warning: service: 3 rows or files did not reach it" in capfd.readouterr().err
