"""Progress on stdout, as a bar in a terminal and as plain lines elsewhere, and in log.txt."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from metaformer import streams
from metaformer.interfaces import Row
from metaformer.tracking.line_file import LineFile
from metaformer.tracking.tracker import NullTracker


class ConsoleTracker(NullTracker):
    """A tracker that prints to stdout and appends to a log file.

    Args:
        epochs, steps: Totals of the run, for the progress and the time left.
        log_file: File to which every line is appended, with its time.
        alarm: Called with a message when stdout or stderr can no longer be written; the log file gets it too.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        samples_per_step: int,
        log_file: Path,
        alarm: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._epochs, self._steps, self._samples_per_step = epochs, steps, samples_per_step
        self._log, self._alarm = LineFile(log_file), alarm
        self._failures: dict[str, str] = {}
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("starting", total=steps)
            self._bar.start()

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)
        self._write(text)
        self._note_failures()

    def metrics(self, row: Row) -> None:
        if row["kind"] == "train":
            line = self._train_line(row)
            self._write(line)
            if self._bar is None:
                self._console.print(line, markup=False)
            else:
                self._bar.update(self._task, completed=row["step"], description=line)
        elif row["kind"] == "validation":
            self.message(_validation_line(row))
        self._note_failures()

    def close(self, failed: bool) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._note_failures()
        self._log.close()

    def _train_line(self, row: Row) -> str:
        seconds = (self._steps - row["step"]) * self._samples_per_step / row["images_per_second"]
        memory = f"  {row['memory_gib']:.1f} GiB" if row["memory_gib"] else ""
        skipped = f"  skipped {row['skipped_steps']}" if row["skipped_steps"] else ""
        return (
            f"epoch {row['epoch']}/{self._epochs}  step {row['step']}/{self._steps}  eta {_duration(seconds)}  "
            f"{row['images_per_second']:.0f} images/s  wait {100 * row['data_wait']:.0f} %  lr {row['lr']:.2e}  "
            f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}{skipped}{memory}"
        )

    def _note_failures(self) -> None:
        """Report, once for each, that stdout or stderr can no longer be written."""
        failures = streams.failures()
        if failures != self._failures:
            problem = "; ".join(f"{name} cannot be written ({reason})" for name, reason in failures.items())
            self._write(f"ALARM        {problem}; training continues, this file has all lines of the run")
            self._alarm(problem)
            self._failures = failures

    def _write(self, line: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


def _validation_line(row: Row) -> str:
    ema = f"  EMA top-1 {row['ema_top1']:.2f} %" if "ema_top1" in row else ""
    return (
        f"epoch {row['epoch']} validated on {row['images']} images: top-1 {row['top1']:.2f} %  "
        f"top-5 {row['top5']:.2f} %  loss {row['loss']:.4f}{ema}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
