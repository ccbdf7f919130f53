"""The lock that prevents two runs from using the same run folder."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metaformer.errors import UserError
from metaformer.files import remove_temporaries_in

LOCK_FILE = "lock"


@contextmanager
def lock_run_folder(run_dir: Path) -> Iterator["RunLock"]:
    """Create the run folder if needed, and lock it within the block. A new folder that stays empty is removed again.

    Temporary files that a killed run has left in the folder are removed.
    """
    try:
        created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be created ({error.strerror or error})") from error
    lock = RunLock(run_dir)
    try:
        with suppress(OSError):  # a folder that cannot be written is reported with the reason when it is written
            remove_temporaries_in(run_dir)
        yield lock
    finally:
        with suppress(OSError):  # the folder is gone, or another run has started in it
            if run_dir in created and [entry.name for entry in run_dir.iterdir()] == [LOCK_FILE]:
                (run_dir / LOCK_FILE).unlink()
                for folder in created:
                    folder.rmdir()
        lock.release()


class RunLock:
    """A POSIX record lock on RUN/lock, which is released when its process ends for any reason.

    It is not a flock(2) lock, which forked children would hold too. The file names the process that holds the lock. It
    is not deleted when the lock is released.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._take()

    def _take(self) -> None:
        run_dir, file = self._run_dir, self._run_dir / LOCK_FILE
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = _read(file)
            os.close(descriptor)
            raise UserError(
                f"run_dir={run_dir}: in use by {holder}; wait until it ends, or give another run_dir"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"run_dir={run_dir}: its file system does not support locks ({error.strerror}), which keep two runs "
                "apart; give a run_dir on another file system, or mount this one with locks"
            ) from error
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            current = file.stat()
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})") from error
        if not os.path.samestat(current, os.fstat(descriptor)):
            os.close(descriptor)
            raise UserError(f"run_dir={run_dir}: another run has just ended and removed its lock file; start again")
        self._descriptor = descriptor

    def check(self) -> str | None:
        """Check that the lock file is still the locked one. If it was removed, lock it again and return a warning.

        A folder that is gone or unreadable is no error here, but is one for the next write to it.

        It is an error if another run is in the folder, or was there in the meantime.
        """
        file = self._run_dir / LOCK_FILE
        try:
            if os.path.samestat(file.stat(), os.fstat(self._descriptor)):
                return None
        except FileNotFoundError:
            if not self._run_dir.is_dir():
                return None
            former = self._descriptor
            self._take()
            os.close(former)
            return f"warning      {file} was removed during the run; it has been locked again"
        except OSError:
            return None
        raise UserError(
            f"{file}: was replaced during the run: another run has started in this folder, and this one ends without "
            f"saving (now locked by {_read(file)}); keep only one of the two, and do not remove the file"
        )

    def release(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def _read(file: Path) -> str:
    try:
        holder: dict[str, Any] = json.loads(file.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # the process has not written its name yet
