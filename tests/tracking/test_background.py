"""Tests that a slow, stuck, broken or killed tracker neither blocks training nor silently loses rows."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from metaformer.tracking import background
from metaformer.tracking.background import BackgroundTracker
from tests.conftest import REPOSITORY

COMMAND = (sys.executable, str(Path(__file__).with_name("served_tracker.py")))


def tracker_of(
    folder: Path, fault: str = "", open_seconds: float = 60.0, close_seconds: float = 60.0
) -> BackgroundTracker:
    return BackgroundTracker("service", COMMAND, (folder, fault), open_seconds, close_seconds)


def calls(folder: Path, start: int = 1) -> list[list[Any]]:
    """Return the calls that a start received, without its first line, the position of the first start."""
    return [json.loads(line) for line in (folder / f"start-{start}").read_text().splitlines()][1:]


def rows_and(count: int, *other_calls: list[Any]) -> list[list[Any]]:
    return [*(["row", step] for step in range(count)), *other_calls]


def log(tracker: BackgroundTracker, *steps: int) -> None:
    for step in steps:
        tracker.metrics({"step": step})


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("failed", [True, False])
def test_everything_arrives_in_order(failed: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All kinds of calls reach the other process; nothing is printed, and the process has ended."""
    tracker = tracker_of(tmp_path)
    row = {"step": 1}
    tracker.metrics(row)
    row["step"] = 5  # changes after logging do not count
    tracker.message("text")
    tracker.picture("name", Path("file"))
    tracker.checkpoint(Path("folder"), ["best"])
    log(tracker, 2)
    wait_for(lambda: (tmp_path / "start-1").exists() and len(calls(tmp_path)) == 5)
    tracker.close(failed)
    assert calls(tmp_path) == [
        ["row", 1], ["message", "text"], ["picture", "name", "file"], ["checkpoint", "folder", ["best"]], ["row", 2],
        ["close", failed],
    ]  # fmt: skip
    assert capfd.readouterr().err == ""
    assert tracker._process.poll() == 0


def test_a_slow_tracker_does_not_block(tmp_path: Path) -> None:
    """A slow `open` does not block the caller; everything arrives once it continues."""
    tracker = tracker_of(tmp_path, "opening-waits")
    began = time.monotonic()
    log(tracker, *range(10_000))
    assert time.monotonic() - began < 10
    assert list(tmp_path.glob("start-*")) == [] or calls(tmp_path) == []
    (tmp_path / "go").touch()
    tracker.close(failed=False)
    assert calls(tmp_path) == rows_and(10_000, ["close", False])


@pytest.mark.parametrize("fault", ["opening-raises", "row-raises"])
def test_a_broken_tracker_is_restarted_once_and_then_disabled(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """If both starts raise an error, each prints a line when it happens, and `close` does not wait."""
    tracker = tracker_of(tmp_path, fault)
    log(tracker, 0, 1, 2)
    wait_for(lambda: tracker._ended)
    began = time.monotonic()
    log(tracker, 3)
    tracker.close(failed=False)
    assert time.monotonic() - began < 5
    upload = "`upload start-2` uploads what it has; " if fault == "row-raises" else ""
    assert capfd.readouterr().err.splitlines() == [
        "warning: service: a reason; restarting it with all rows; training continues",
        f"warning: service: a reason; disabled from now on; training continues; {upload}the run folder has all rows",
    ]


@pytest.mark.parametrize("fault", ["row-kills-once", "closing-kills-once", "opening-raises-once"])
def test_a_tracker_that_dies_once_gets_everything_again(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """After SIGKILL during a row or `close`, or an error in `open`, the second start receives all rows."""
    tracker = tracker_of(tmp_path, fault)
    log(tracker, 0, 1, 2, 3)
    tracker.close(failed=False)
    assert calls(tmp_path, 2) == rows_and(4, ["close", False])
    reason = "a reason" if fault == "opening-raises-once" else "its process ended (signal 9)"
    # A line that begins with "waiting" comes first on a machine where the second start takes seconds.
    warnings = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("waiting ")]
    assert warnings == [f"warning: service: {reason}; restarting it with all rows; training continues"]
    first_line = json.loads((tmp_path / "start-2").read_text().splitlines()[0])
    assert first_line == ["first position", None if fault == "opening-raises-once" else 1]


def test_a_death_during_a_hanging_open_is_noticed_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If the service dies and `open` hangs forever, the tracker is restarted long before `open_seconds`."""
    (tmp_path / "go").touch()
    tracker = tracker_of(tmp_path, "dies-opening-once")
    log(tracker, 0, 1)
    tracker.close(failed=False)
    assert "the service died; restarting it" in capfd.readouterr().err
    assert calls(tmp_path, 2) == rows_and(2, ["close", False])


def test_a_death_between_two_rows_is_noticed_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If the service dies while nothing is logged, it is reported and restarted without waiting for a row."""
    tracker = tracker_of(tmp_path, "dies-once")
    log(tracker, 0, 1)
    wait_for(lambda: (tmp_path / "start-1").exists() and calls(tmp_path) == rows_and(2))
    (tmp_path / "go").touch()
    wait_for(lambda: (tmp_path / "start-2").exists() and calls(tmp_path, 2) == rows_and(2))
    assert "the service died; restarting it" in capfd.readouterr().err
    tracker.close(failed=False)
    assert calls(tmp_path, 2) == rows_and(2, ["close", False])


def test_opening_late_is_reported_and_everything_arrives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A line after `open_seconds`, another when the tracker opens after all; the queued rows arrive."""
    tracker = tracker_of(tmp_path, "opening-waits", open_seconds=0.3)
    log(tracker, 0, 1)
    printed = ""
    deadline = time.monotonic() + 60
    while "not open" not in printed:
        assert time.monotonic() < deadline
        printed += capfd.readouterr().err
    assert printed == "warning: service: not open after 0.3 s; training continues, and rows are queued\n"
    (tmp_path / "go").touch()
    wait_for(lambda: (tmp_path / "start-1").exists() and calls(tmp_path) == rows_and(2))
    tracker.close(failed=False)
    assert calls(tmp_path) == rows_and(2, ["close", False])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("service: open after ")


def test_a_tracker_that_never_opened_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After `open_seconds`, `close` returns at once, reports what is missing, and leaves no process."""
    tracker = tracker_of(tmp_path, "opening-waits", open_seconds=0.3, close_seconds=300)
    log(tracker, 0, 1)
    tracker.picture("name", Path("file"))
    wait_for(lambda: (tmp_path / "start-1").exists())
    time.sleep(1)
    began = time.monotonic()
    tracker.close(failed=False)
    assert time.monotonic() - began < 10
    late, given_up = capfd.readouterr().err.splitlines()
    assert "not open after 0.3 s" in late
    assert given_up == (
        "warning: service: has not opened; still missing: 2 rows and 1 file; the run folder has all rows"
    )
    wait_for(lambda: tracker._process.poll() is not None)


@pytest.mark.parametrize("failed", [True, False])
def test_a_stuck_tracker_is_given_up(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`close` waits for its limit, or less after a failure; then it counts what is missing and says what to do."""
    monkeypatch.setattr(background, "FAILED_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(background, "SILENT_SECONDS", 0.2)
    tracker = tracker_of(tmp_path, "row-waits", close_seconds=60 if failed else 1)
    log(tracker, *range(4))
    wait_for(lambda: tracker._opened)
    time.sleep(0.1)
    began = time.monotonic()
    tracker.close(failed)
    assert (0.1 if failed else 1) <= time.monotonic() - began < 10
    *waiting, warning = capfd.readouterr().err.splitlines()
    assert waiting == ([] if failed else ["waiting      until service has 4 rows, or for 1 s without progress"])
    why = "had no time to finish" if failed else "no progress in 1 s"
    assert warning == (
        f"warning: service: {why}; still missing: 4 rows; `upload start-1` uploads what it has; "
        "the run folder has all rows"
    )


def test_progress_extends_the_final_wait(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`close` waits as long as bytes move, even several times its limit."""
    tracker = tracker_of(tmp_path, "closing-moves", close_seconds=3)
    wait_for(lambda: tracker._opened)
    release = time.monotonic() + 8

    def let_go() -> None:
        while time.monotonic() < release:
            time.sleep(0.1)
        (tmp_path / "go").touch()

    threading.Thread(target=let_go).start()
    tracker.close(failed=False)
    assert time.monotonic() >= release
    assert calls(tmp_path) == [["close", False]]
    assert capfd.readouterr().err == "waiting      until service has the end of the run, or for 3 s without progress\n"


@pytest.mark.parametrize("fault", ["", "row-kills", "row-raises", "row-waits"])
def test_temporary_files(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None are left behind, whether the tracker is closed, dies, fails or is given up."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    tracker = tracker_of(tmp_path, fault, close_seconds=1 if fault == "row-waits" else 60)
    wait_for(lambda: len(list(place.glob("tracker-*/*"))) == 1)
    log(tracker, *range(4))
    tracker.close(failed=False)
    assert list(place.iterdir()) == []


def test_child_processes_of_the_tracker_end_with_it(tmp_path: Path) -> None:
    """The service of a tracker that is given up does not outlive training."""
    tracker = tracker_of(tmp_path, "starts-another", close_seconds=0.5)
    wait_for(lambda: tracker._opened)
    other = int((tmp_path / "other").read_text())
    os.kill(other, 0)
    tracker.close(failed=False)
    wait_for(lambda: not Path(f"/proc/{other}").exists() or "Z" in Path(f"/proc/{other}/stat").read_text())


def test_a_tracker_that_cannot_be_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A missing program is reported in one line, and training continues."""
    tracker = BackgroundTracker("service", [str(tmp_path / "nothing")], (), 60, 60)
    log(tracker, 0)
    tracker.close(failed=False)
    assert capfd.readouterr().err == (
        "warning: service: cannot be started (No such file or directory); training continues without it\n"
    )


def test_a_stuck_tracker_does_not_outlive_training(tmp_path: Path) -> None:
    """After SIGKILL to training during a stuck call, the tracker's process ends by itself, without temporary files."""
    place = tmp_path / "tmp"
    place.mkdir()
    program = (
        "import sys, time; from pathlib import Path; from tests.tracking.test_background import log, tracker_of;"
        "tracker = tracker_of(Path(sys.argv[1]), 'row-waits'); log(tracker, 0);"
        "print(tracker._process.pid, flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"TMPDIR": str(place)}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        stuck = int(training.stdout.readline())
        wait_for(lambda: (tmp_path / "start-1").exists() and (tmp_path / "start-1").read_text())
        assert len(list(place.iterdir())) == 1
        training.kill()
    wait_for(lambda: not Path(f"/proc/{stuck}").exists() or ") Z " in Path(f"/proc/{stuck}/stat").read_text())
    assert list(place.iterdir()) == []
