"""One run in a run folder at a time."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metaformer.errors import UserError

LOCK_FILE = "lock"


@contextmanager
def lock_run_folder(run_dir: Path) -> Iterator["RunLock"]:
    """The run folder, made if need be, for this process alone; removed again if nothing comes into it.

    Raises:
        UserError: another run holds it, or it cannot be made or written.
    """
    try:
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be made ({error.strerror or error})") from error
    lock = RunLock(run_dir)
    try:
        yield lock
    finally:
        with suppress(OSError):  # the folder is gone, or another run has begun beside this one
            if run_dir in made and [entry.name for entry in run_dir.iterdir()] == [LOCK_FILE]:
                (run_dir / LOCK_FILE).unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


class RunLock:
    """A POSIX record lock on RUN/lock: it ends with the process that holds it, however that ends.

    Not flock(2): a child that is forked would hold that too. The file says who holds it; it stays behind, unlocked.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
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
                f"run_dir={run_dir}: {holder} trains in it; wait for its end, or give another run_dir"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"run_dir={run_dir}: its file system has no locks ({error.strerror}), which keep two runs apart; "
                "give a run_dir on another, or mount it with locks"
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
            raise UserError(f"run_dir={run_dir}: another run has just left it, and removed its lock; start again")
        self._descriptor = descriptor

    def check(self) -> str | None:
        """Return None while the file is the one that is locked; take it again if it was removed, and say so.

        A folder that is gone, or cannot be looked at, is left to whoever writes there.

        Raises:
            UserError: another run has been in the folder since, or is.
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
            f"saving (now there: {_read(file)}); keep one of the two, and do not remove the file"
        )

    def release(self) -> None:
        """Let another run in."""
        os.close(self._descriptor)


def _read(file: Path) -> str:
    try:
        holder: dict[str, Any] = json.loads(file.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has only just taken the lock
