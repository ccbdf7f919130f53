"""Tests of the process that writes reports: it takes no time from training, and its failure is one warning."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from metaformer.tracking.report import ReportTracker

# Appends a line to RUN/written, after a number of seconds; with an argument `fail`, prints two lines and fails.
WRITER = """
import sys, time
from pathlib import Path
time.sleep(float(sys.argv[1]))
with (Path(sys.argv[-1]) / "written").open("a") as file:
    file.write("x\\n")
if sys.argv[2] == "fail":
    sys.exit("Traceback\\nno \\x1b room")
"""


def command(seconds: float = 0.0, outcome: str = "ok") -> list[str]:
    return [sys.executable, "-c", WRITER, str(seconds), outcome]


def row(kind: str) -> dict[str, Any]:
    return {"kind": kind, "epoch": 1, "step": 1, "samples": 1}


def written(run_dir: Path) -> int:
    file = run_dir / "written"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_after_validations_and_at_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A report is written after a validation, not after other rows, and at the end."""
    tracker = ReportTracker(tmp_path, command())
    tracker.metrics(row("train"))
    tracker.metrics(row("validation"))
    end = time.monotonic() + 30
    while not written(tmp_path) and time.monotonic() < end:
        time.sleep(0.01)
    tracker.metrics(row("final"))
    tracker.start_last(failed=False)
    tracker.close(failed=False)
    assert written(tmp_path) == 2
    assert capfd.readouterr() == ("", "")


def test_training_does_not_wait(tmp_path: Path) -> None:
    """Validations during a slow report return at once, and are in the next report."""
    tracker = ReportTracker(tmp_path, command(seconds=1.0))
    started = time.monotonic()
    for _ in range(3):
        tracker.metrics(row("validation"))
    assert time.monotonic() - started < 0.5
    tracker.start_last(failed=False)
    tracker.close(failed=False)
    assert written(tmp_path) == 2


def test_failures_are_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A report that fails, again and again, is one line on stderr with the reason."""
    tracker = ReportTracker(tmp_path, command(outcome="fail"))
    tracker.metrics(row("validation"))
    tracker.start_last(failed=False)
    tracker.close(failed=False)
    assert written(tmp_path) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(r"warning: report: no \x1b room; the run is unaffected; ")


def test_program_that_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program that cannot be started is a warning too, which is also true after the end of training."""
    tracker = ReportTracker(tmp_path, [str(tmp_path / "missing")])
    tracker.start_last(failed=False)
    tracker.close(failed=False)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: report: No such file or directory; the run is unaffected; ")


@pytest.mark.parametrize("failed", [False, True])
def test_report_that_hangs(tmp_path: Path, failed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """A report that hangs is killed after its limit; the end of a run that failed waits for two seconds at most."""
    tracker = ReportTracker(tmp_path, command(seconds=100.0), limit_seconds=60.0 if failed else 0.3)
    tracker.metrics(row("validation"))
    process = tracker._process
    assert process is not None
    started = time.monotonic()
    tracker.start_last(failed=failed)
    tracker.close(failed=failed)
    assert time.monotonic() - started < 3
    assert process.returncode == -9
    assert ("not written in 0.3 s" in capfd.readouterr().err) is not failed
    assert written(tmp_path) == 0
