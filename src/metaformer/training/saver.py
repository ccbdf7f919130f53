"""Writes checkpoints while training continues: from a copy in host memory, in a thread, one at a time."""

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path

from metaformer.errors import Diverged, UserError, one_line
from metaformer.training.checkpoint import CheckpointFolder
from metaformer.training.config import CheckpointConfig
from metaformer.training.divergence import ADVICE
from metaformer.training.state import Snapshot, TrainState

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointSaver:
    """Saves the state on rank 0.

    Failures are reported at the next save. Earlier checkpoints stay as they were and training continues, until
    `max_failed_saves` consecutive saves have failed.

    Args:
        alarm: called with a line for each save that failed.
        check_lock: called before each save; returns a line to report, or raises UserError if another process has
            taken the run folder.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        alarm: Callable[[str], None],
        check_lock: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._check_lock = check_lock
        self._config, self._alarm = config, alarm
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[str, Future[Path]] | None = None
        self._failed_in_a_row = 0

    def save(self, state: TrainState, name: str, is_best: bool) -> None:
        """Wait for the previous save, copy the state, and start writing the copy.

        Raises:
            Diverged: the previous save was refused because its weights were not finite.
        """
        self.wait()
        warning = self._check_lock()
        if warning is not None:
            self._alarm(warning)
        writing = self._thread.submit(self._write, state.snapshot(), name, is_best)
        self._writing = (name, writing)
        if not self._config.background:
            wait_for([writing])

    def wait(self, must_succeed: bool = False) -> None:
        """Wait until the last save is on disk.

        Args:
            must_succeed: raise an error if the save failed, because training ends here.

        Raises:
            Diverged: as in `save`.
        """
        if self._writing is None:
            return
        name, future = self._writing
        self._writing = None
        try:
            future.result()
        except OSError as error:
            self._count_failure(name, error, must_succeed)
            return
        self._failed_in_a_row = 0

    def close(self) -> None:
        """Let the current save finish, and ignore its result."""
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot, name: str, is_best: bool) -> Path:
        wrong = snapshot.not_finite()
        if wrong is not None:
            raise Diverged(
                f"checkpoint {name}: not written: {wrong} is not finite; {ADVICE}; the same command resumes from the "
                "previous checkpoint"
            )
        return self.folder.save(snapshot, name, is_best)

    def _count_failure(self, name: str, error: OSError, must_succeed: bool) -> None:
        self._failed_in_a_row += 1
        reason = error.strerror or one_line(error)
        failed, limit = self._failed_in_a_row, self._config.max_failed_saves
        before = f", nor could the {failed - 1} before it" if failed > 1 else ""
        if must_succeed or failed >= limit:
            full = error.errno in (None, *_NO_ROOM) or not error.filename
            fix = "free some space or repair the disk" if full else f"check {error.filename2 or error.filename}"
            raise UserError(
                f"checkpoint {name}: cannot be written ({reason}){before}; {fix}; the same command then resumes "
                "from the last checkpoint"
            ) from error
        self._alarm(
            f"ALARM        checkpoint {name} could not be written ({reason}); failure {failed} in a row; "
            f"training stops after {limit}"
        )
