"""Shows progress on stdout as lines, with a bar below them in terminals, and writes the lines to log.txt."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from metaformer import streams
from metaformer.goodput import TRAINING, VALIDATING
from metaformer.interfaces import Row
from metaformer.tracking.line_file import LineFile
from metaformer.tracking.progress_bar import ProgressBar, terminal_console
from metaformer.tracking.tracker import NullTracker

WIDTHS = {"eta": 6, "wait": 5, "lr": 8, "loss": 6, "norm": 6, "GiB": 5}  # characters of the columns of a log row


class ConsoleTracker(NullTracker):
    """A tracker that prints to stdout and appends to a log file.

    Args:
        epochs: Epochs of the whole run.
        steps: The step at which this start ends.
        validation_steps: Steps from one validation to the next; None leaves validations out of the remaining time.
        log_file: File to which each line is appended with its time.
        alarm: Called with a message if stdout or stderr can no longer be written; the log file contains it too.
    """

    def __init__(
        self,
        *,
        epochs: int,
        steps: int,
        samples_per_step: int,
        log_file: Path,
        alarm: Callable[[str], None] = lambda line: None,
        validation_steps: int | None = None,
    ) -> None:
        self._epochs, self._steps, self._samples_per_step = epochs, steps, samples_per_step
        self._validation_steps = validation_steps
        self._log, self._alarm = LineFile(log_file), alarm
        self._failures: dict[str, str] = {}
        self._console = terminal_console()
        self._bar = ProgressBar(self._console)
        self._note = ""  # the bar's, while training
        self._columns: tuple[str, ...] = ()  # of the rows above
        self._validating_since: float | None = None
        self._validation_seconds = 0.0  # duration of the last validation

    def message(self, text: str) -> None:
        # Terminals wrap long lines themselves, so that they are copied as one.
        self._console.print(text, markup=False, soft_wrap=True)
        self._write(text)
        self._note_failures()

    def progress(self, activity: str, done: int, total: int) -> None:
        if activity == VALIDATING and self._validating_since is None:
            self._validating_since = time.monotonic()
        self._bar.show(activity, done, total, f"{done}/{total}{self._note if activity == TRAINING else ''}")

    def metrics(self, row: Row) -> None:
        if row["kind"] == "train":
            left = duration(self._seconds_left(row))
            self._note = f"  epoch {row['epoch']}/{self._epochs}  {left} left"
            self.progress(TRAINING, row["step"], self._steps)  # set before the lines are printed, which redraws the bar
            cells = self._cells(row, left)
            if tuple(cells) != self._columns:
                self._columns = tuple(cells)
                self.message("  ".join(f"{name:>{self._width(name)}}" for name in cells))
            self.message("  ".join(f"{text:>{self._width(name)}}" for name, text in cells.items()))
        else:
            if self._validating_since is not None:
                self._validation_seconds = time.monotonic() - self._validating_since
                self._validating_since = None
            if row["kind"] == "validation":
                self.message(_validation_line(row))
                self._columns = ()
        self._note_failures()

    def close(self, failed: bool) -> None:
        self._bar.close()
        self._note_failures()
        self._log.close()

    def _seconds_left(self, row: Row) -> float:
        """Return the remaining time of this start, at the speed of the last steps and of the last validation."""
        training = (self._steps - row["step"]) * self._samples_per_step / row["images_per_second"]
        if self._validation_steps is None:
            return float(training)
        validations = math.ceil(self._steps / self._validation_steps) - (row["step"] - 1) // self._validation_steps
        return float(training + validations * self._validation_seconds)

    def _cells(self, row: Row, left: str) -> dict[str, str]:
        """Return a row's cells by the names of their columns."""
        cells = {
            "epoch": f"{row['epoch']}/{self._epochs}",
            "step": f"{row['step']}",
            "eta": left,
            "images/s": f"{row['images_per_second']:.0f}",
            "wait": f"{100 * row['data_wait']:.0f} %",
            "lr": f"{row['lr']:.2e}",
            "loss": f"{row['loss']:.4f}",
            "norm": f"{row['grad_norm']:.2f}",
        }
        cells |= {"GiB": f"{row['memory_gib']:.1f}"} if row["memory_gib"] else {}
        return cells | ({"skip": f"{row['skipped_steps']}"} if row["skipped_steps"] else {})

    def _width(self, column: str) -> int:
        """Return the characters of a column: all of them have room in a terminal of 80."""
        widths = {"epoch": 2 * len(str(self._epochs)) + 1, "step": len(str(self._steps))}
        return max(len(column), widths.get(column, WIDTHS.get(column, 0)))

    def _note_failures(self) -> None:
        """Report that stdout or stderr can no longer be written, once for each."""
        failures = streams.failures()
        if failures != self._failures:
            problem = "; ".join(f"{name} cannot be written ({reason})" for name, reason in failures.items())
            self._write(f"ALARM        {problem}; training continues, this file has all lines of the run")
            self._alarm(problem)
            self._failures = failures

    def _write(self, line: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


def _validation_line(row: Row) -> str:
    ema = f", EMA {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
    return (
        f"validation   epoch {row['epoch']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, "
        f"loss {row['loss']:.4f}{ema}"
    )


def duration(seconds: float) -> str:
    """Return a duration as text in its two largest units, such as 2h05m."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
