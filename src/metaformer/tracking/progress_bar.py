"""A progress bar in the bottom line of a terminal; it does nothing if there is no terminal."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

REFRESHES_PER_SECOND = 4.0


class ProgressBar:
    """A line with an activity, a bar and a note, as wide as the terminal. It disappears when it is closed.

    Args:
        console: Console whose terminal shows the bar. Text printed on it appears above the bar.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    def show(self, activity: str, done: int, total: int, note: str) -> None:
        """Show the progress of an activity."""
        if self._progress is None:
            if not self._console.is_terminal or self._console.is_dumb_terminal:
                return
            self._progress = _make(self._console)
            self._progress.add_task(activity, completed=done, total=total, note=note)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], description=activity, completed=done, total=total, note=note)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def terminal_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that counts as a terminal only if the stream is one."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, force_terminal=stream.isatty())


def _make(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
    )
    return Progress(
        *columns,
        console=console,
        expand=True,
        transient=True,
        refresh_per_second=REFRESHES_PER_SECOND,
        redirect_stdout=sys.stdout.isatty(),  # other output appears above the bar; a file stays unchanged
        redirect_stderr=sys.stderr.isatty(),
    )
