"""Writing checkpoints while training goes on: from a copy in host memory, in a thread, one at a time."""

import errno
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path

from metaformer.errors import Diverged, UserError, one_line
from metaformer.training.checkpoint import CheckpointConfig, CheckpointFolder
from metaformer.training.state import Snapshot, TrainState

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointSaver:
    """Saves rank 0's state.

    A save that fails is told of at the next one: earlier checkpoints are as they were and training goes on, until
    `max_failed_saves` in a row have failed.

    Args:
        alarm: gets a line for each save that failed.
        check_lock: called before each save; returns a line to report, or raises a UserError if the run no longer has
            its folder for itself.
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
        """Take a copy of the state and start writing it; waits for the save before.

        Raises:
            UserError: too many saves in a row have failed, the one before included; or another run is in the folder.
            Diverged: the weights of the one before were not finite: it was not written.
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
        """Until the last save is on disk.

        Args:
            must_succeed: training ends here, a save that fails is an error.

        Raises:
            UserError, Diverged: as in `save`.
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
        """Let the save under way finish; what it says is of no use any more."""
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot, name: str, is_best: bool) -> Path:
        wrong = snapshot.not_finite()
        if wrong is not None:
            raise Diverged(
                f"checkpoint {name}: not written: {wrong} is not finite; lower optimizer.lr, set clip_grad_norm, or "
                "use precision=bf16 or fp32; the same command goes on from the checkpoint before"
            )
        return self.folder.save(snapshot, name, is_best)

    def _count_failure(self, name: str, error: OSError, must_succeed: bool) -> None:
        self._failed_in_a_row += 1
        reason = error.strerror or one_line(error)
        failed, limit = self._failed_in_a_row, self._config.max_failed_saves
        before = f", nor could {failed - 1} before it" if failed > 1 else ""
        if must_succeed or failed >= limit:
            full = error.errno in (None, *_NO_ROOM) or not error.filename
            mend = "make room or mend the disk" if full else f"look at {error.filename2 or error.filename}"
            raise UserError(
                f"checkpoint {name}: cannot be written ({reason}){before}; {mend}: the same command goes on from the "
                "last checkpoint"
            ) from error
        self._alarm(f"ALARM        checkpoint {name} could not be written ({reason}); failure {failed} of {limit} "
                    "in a row, then training stops")  # fmt: skip
