"""Tests of console output: plain lines, a bar below them in a terminal, and everything in log.txt."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from metaformer.tracking.console import ConsoleTracker, duration

PROGRAM = """
import sys
from pathlib import Path
from tests.tracking.test_console import run
run(Path(sys.argv[1]), pause=0.6)  # the bar is drawn four times a second
"""


def train_row(step: int, **figures: Any) -> dict[str, Any]:
    return {
        "kind": "train", "epoch": 1, "step": step, "samples": 8 * step, "loss": 1.25, "lr": 4e-3, "grad_norm": 0.5,
        "images_per_second": 16.0, "data_wait": 0.25, "skipped_steps": 0, "memory_gib": 0.0,
    } | figures  # fmt: skip


def run(log_file: Path, pause: float = 0.0) -> None:
    """Track a run of 1000 steps with three train rows, a validation and a final row."""
    tracker = ConsoleTracker(epochs=3, steps=1000, samples_per_step=8, log_file=log_file)
    tracker.message("model        [tiny], 3 classes")
    tracker.metrics(train_row(10))
    tracker.progress("training", 399, 1000)
    tracker.metrics(train_row(400, skipped_steps=3, memory_gib=12.34))
    time.sleep(pause)
    tracker.progress("validation", 3, 13)
    time.sleep(pause)
    scores = {"images": 403, "top1": 25.0, "top5": 75.5, "loss": 1.5, "ema_top1": 30.25}
    tracker.metrics({"kind": "validation", "epoch": 1, "step": 400, "samples": 3200} | scores)
    tracker.metrics(train_row(800, epoch=2))
    tracker.metrics({"kind": "final", "epoch": 2, "step": 800, "samples": 6400} | scores)
    tracker.close(failed=False)


EXPECTED = [
    "model        [tiny], 3 classes",
    "epoch  step     eta  images/s   wait        lr    loss    norm",
    "  1/3    10   8m15s        16   25 %  4.00e-03  1.2500    0.50",
    "epoch  step     eta  images/s   wait        lr    loss    norm    GiB  skip",
    "  1/3   400   5m00s        16   25 %  4.00e-03  1.2500    0.50   12.3     3",
    "validation   epoch 1: top-1 25.00 %, top-5 75.50 %, loss 1.5000, EMA 30.25 %",
    "epoch  step     eta  images/s   wait        lr    loss    norm",
    "  2/3   800   1m40s        16   25 %  4.00e-03  1.2500    0.50",
]


def without_times(log_file: Path) -> list[str]:
    lines = log_file.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def test_plain_lines_without_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe gets one unwrapped line per row, without control characters; log.txt gets the same lines with times."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI systems set it, for which rich takes a pipe for a terminal
    run(tmp_path / "log.txt")
    printed = capfd.readouterr().out
    assert printed.splitlines() == EXPECTED
    assert "\x1b" not in printed
    assert without_times(tmp_path / "log.txt") == EXPECTED


def in_terminal(columns: int, *arguments: str) -> str:
    """Run Python in a terminal of this width and return what it shows."""
    child, terminal = pty.fork()
    if child == 0:
        # Without the size that rich prefers to the terminal's. readline, which pytest imports, sets it too, but outside
        # of os.environ: execv would pass that on.
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {
            "TERM": "xterm",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
        }
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # Linux's signal that the other side has closed
        pass
    _, status = os.waitpid(child, 0)
    text = shown.decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    return text


def drawn_bars(text: str) -> list[str]:
    """Return each drawing of the bar, without control sequences."""
    parts = re.split(r"[\r\n]|\x1b\[2K", text)
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in parts if "\u2501" in part]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_in_a_terminal(columns: int, tmp_path: Path) -> None:
    """A bar of one line, as wide as the terminal, is redrawn in place below the lines, which stay; then it is gone."""
    text = in_terminal(columns, "-c", PROGRAM, str(tmp_path / "log.txt"))
    bars = drawn_bars(text)
    assert bars
    assert {len(bar) for bar in bars} <= {columns}
    assert text.count("\x1b[1A") <= 1, "the cursor moves up once, to remove the bar: it has a single line"
    for activity, note in (("training", "400/1000  epoch 1/3  5m00s left"), ("validation", "3/13")):
        assert any(re.fullmatch(rf"{activity} +[\u2501\u2578\u257a]+ {note} *", bar) for bar in bars), bars
    for line in EXPECTED:
        assert f"{line}\r\n" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text), "as one line, wrapped by the terminal"
    assert without_times(tmp_path / "log.txt") == EXPECTED


def test_rows_fit_a_terminal(tmp_path: Path) -> None:
    """The rows of a long run on fast GPUs, and the lines of its validations, have at most 80 characters."""
    tracker = ConsoleTracker(epochs=310, steps=1_234_567, samples_per_step=1024, log_file=tmp_path / "log.txt")
    figures = {"images_per_second": 23456.7, "data_wait": 1.0, "loss": 6.9078, "grad_norm": 123.45, "memory_gib": 139.9}
    tracker.metrics(train_row(123_456, epoch=300, skipped_steps=1234, **figures))
    scores = {"top1": 77.25, "top5": 100.0, "loss": 6.9078, "ema_top1": 77.5}
    tracker.metrics({"kind": "validation", "epoch": 300, "step": 375_300} | scores)
    tracker.close(failed=False)
    lines = without_times(tmp_path / "log.txt")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80, lines


def test_log_is_appended_to(tmp_path: Path) -> None:
    """A resumed run appends to the earlier log."""
    run(tmp_path / "log.txt")
    run(tmp_path / "log.txt")
    assert without_times(tmp_path / "log.txt") == EXPECTED * 2


@pytest.mark.parametrize(
    ("images_per_second", "eta"), [(8.0, "16m30s"), (1.0, "2h12m"), (0.02, "4d14h"), (8000.0, "0m00s")]
)
def test_time_left(tmp_path: Path, images_per_second: float, eta: str) -> None:
    """The ETA is the remaining images at the current speed, in two units of time."""
    tracker = ConsoleTracker(epochs=3, steps=1000, samples_per_step=8, log_file=tmp_path / "log.txt")
    tracker.metrics(train_row(10, images_per_second=images_per_second))
    tracker.close(failed=False)
    assert f" {eta}  " in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(("step", "validations"), [(10, 3), (400, 3), (401, 2), (950, 1)])
def test_time_left_counts_validations(
    step: int, validations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each validation to come, after every 400 steps and at the end, is expected to take as long as the last one."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tracker = ConsoleTracker(
        epochs=3, steps=1000, samples_per_step=8, log_file=tmp_path / "log.txt", validation_steps=400
    )
    tracker.progress("validation", 0, 13)
    clock[0] = 160.0
    tracker.metrics({"kind": "final", "epoch": 1, "step": 0, "samples": 0})
    tracker.metrics(train_row(step, images_per_second=8.0))
    tracker.close(failed=False)
    assert f" {duration(1000 - step + 60 * validations)}  " in (tmp_path / "log.txt").read_text()
