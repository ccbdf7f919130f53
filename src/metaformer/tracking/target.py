"""The user's own tracker, which runs in a separate process (`tracker_process`)."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaformer.errors import one_line
from metaformer.interfaces import Row, Tracker
from metaformer.targets import import_target
from metaformer.tracking.service import Opened


class TargetTracker:
    """Forwards all calls to an instance of the user's class."""

    def open(
        self, target: str, path: Sequence[str], run_dir: Path, options: Mapping[str, Any], first_position: int | None
    ) -> Opened:
        """Import the class and make the tracker.

        Args:
            target: `package.module:Class`; called with `run_dir` and the options.
            path: Folders from which Python imports.
            first_position: Not used: the tracker does not count rows.
        """
        sys.path[:] = path
        make = import_target("tracking.target", target)
        try:
            self._tracker: Tracker = make(run_dir=run_dir, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{target} cannot be made with {', '.join(['run_dir', *options])}: {one_line(error)}"
            ) from error
        return Opened("", None)

    def metrics(self, row: Row) -> None:
        self._tracker.metrics(row)

    def message(self, text: str) -> None:
        self._tracker.message(text)

    def progress(self, activity: str, done: int, total: int) -> None:
        """Do nothing, because progress is only shown in terminals and not sent to this process."""

    def picture(self, name: str, file: Path) -> None:
        self._tracker.picture(name, file)

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        self._tracker.checkpoint(folder, aliases)

    def close(self, failed: bool) -> None:
        self._tracker.close(failed)

    def check(self) -> None:
        """Do nothing, because there is no service process."""

    def bytes_moved(self) -> int:
        """Return 0, because the progress of closing is unknown."""
        return 0
