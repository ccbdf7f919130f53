"""Tests of the lock of a run folder, with real processes that hold it, are killed, and leave children behind."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from metaformer.files import temporary_beside, write_text_atomically
from metaformer.goodput import Goodput
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.jsonl import JsonlTracker
from metaformer.tracking.lock import LOCK_FILE, RunLock, lock_run_folder
from metaformer.tracking.run_folder import check_empty, open_run_folder
from metaformer.tracking.status import DONE, StatusFile

FORK = multiprocessing.get_context("fork")


def hold(run_dir: Path, ready: Any, leave_child: bool) -> None:
    """Hold the lock until killed, optionally with a forked child such as a data worker."""
    with lock_run_folder(run_dir):
        if leave_child and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        ready.set()
        time.sleep(60)


@contextmanager
def holder(run_dir: Path, leave_child: bool = False) -> Iterator[Any]:
    """Start another process that holds the lock."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(run_dir, ready, leave_child))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def is_locked(run_dir: Path) -> bool:
    """Return whether another process cannot lock the folder. This process could, if it holds the lock itself."""

    def attempt() -> None:
        try:
            RunLock(run_dir)
        except UserError:
            os._exit(3)

    process = FORK.Process(target=attempt)
    process.start()
    process.join(20)
    assert process.exitcode in (0, 3)
    return process.exitcode == 3


def test_a_second_run_is_rejected(tmp_path: Path) -> None:
    """A second run ends with one line that names the process and the machine of the first."""
    with holder(tmp_path / "run") as process:
        expected = rf"^run_dir=\S+: in use by process {process.pid} on {socket.gethostname()}; wait"
        with pytest.raises(UserError, match=expected), lock_run_folder(tmp_path / "run"):
            pass
    assert (tmp_path / "run" / LOCK_FILE).exists(), "a rejected run removes nothing"


@pytest.mark.parametrize("leave_child", [False, True])
def test_a_dead_run_holds_nothing(tmp_path: Path, leave_child: bool) -> None:
    """After SIGKILL the folder is free at once, even while a child of the dead process is alive."""
    with holder(tmp_path / "run", leave_child) as process:
        assert is_locked(tmp_path / "run")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not is_locked(tmp_path / "run")


def test_a_child_that_ends_does_not_release_the_lock(tmp_path: Path) -> None:
    """A forked data worker that closes all its files and ends does not release its parent's lock."""
    with lock_run_folder(tmp_path / "run"):
        worker = FORK.Process(target=os.closerange, args=(3, 256))
        worker.start()
        worker.join()
        assert is_locked(tmp_path / "run")
    assert not is_locked(tmp_path)


def test_the_runs_own_files_do_not_release_the_lock(tmp_path: Path) -> None:
    """Opening and closing the run's files keeps the lock; only closing the lock file itself would release it."""
    run_dir = tmp_path / "run"
    with lock_run_folder(run_dir):
        check_empty(run_dir)
        for config in ("a: 1\n", "a: 2\n"):
            open_run_folder(run_dir, config, 0)
        status = StatusFile(run_dir, None, Goodput())
        status.start(0, 5)
        console = ConsoleTracker(epochs=1, steps=1, samples_per_step=1, log_file=run_dir / "log.txt")
        trackers = [console, JsonlTracker(run_dir, 0)]
        for tracker in trackers:
            tracker.message("a line")
            tracker.close(failed=False)
        status.end(DONE, 1, "")
        write_text_atomically(run_dir / "other", "text")
        assert is_locked(run_dir)
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDONLY)
        os.close(descriptor)
        assert not is_locked(run_dir), "otherwise this test could not fail"


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """Temporary files of a killed run are removed; a file of the user's with a similar name stays."""
    left_over, own = temporary_beside(tmp_path / "status.json"), tmp_path / ".notes.tmp"
    for file in (left_over, own):
        file.touch()
    with lock_run_folder(tmp_path):
        assert not left_over.exists()
    assert own.exists()


def test_created_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    """A run that fails before it writes anything leaves no folder; existing or used folders stay."""
    with pytest.raises(KeyError), lock_run_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock_run_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert sorted(entry.name for entry in (tmp_path / "a" / "b").iterdir()) == ["file", LOCK_FILE]
    (tmp_path / "there").mkdir()
    with lock_run_folder(tmp_path / "there"):
        pass
    assert (tmp_path / "there").exists()


def test_a_folder_that_is_gone_hides_no_error(tmp_path: Path) -> None:
    """If the run folder was removed, the original error of training is raised, not one about the lock."""

    def fail() -> None:
        with lock_run_folder(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")
            raise UserError("the cause")

    with pytest.raises(UserError, match="the cause"):
        fail()


def test_a_lock_file_that_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that another run has just removed does not count, since it keeps nobody out."""
    lock: Callable[[int, int], None] = fcntl.lockf

    def late(descriptor: int, how: int) -> None:
        (tmp_path / LOCK_FILE).unlink()
        (tmp_path / LOCK_FILE).touch()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(UserError, match=r"another run has just ended and removed its lock file"):
        RunLock(tmp_path)


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_created(tmp_path: Path, below: str) -> None:
    """A file in place of the folder or of its parent gives a one-line error."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"^run_dir=\S+: cannot be created \("),
        lock_run_folder(tmp_path / "file" / below),
    ):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_that_cannot_be_written() -> None:
    """A folder that cannot be written is rejected before training, for root too."""
    with (
        pytest.raises(UserError, match=r"^run_dir=/proc/self: cannot be written \("),
        lock_run_folder(Path("/proc/self")),
    ):
        pass


def test_a_lock_file_removed_during_a_run(tmp_path: Path) -> None:
    """A removed lock file is locked again, with a warning; if it was replaced by another run, this run ends."""
    run_dir = tmp_path / "run"
    with lock_run_folder(run_dir) as lock:
        assert lock.check() is None
        (run_dir / LOCK_FILE).unlink()
        assert (
            lock.check() == f"warning      {run_dir / LOCK_FILE} was removed during the run; it has been locked again"
        )
        assert lock.check() is None
        assert is_locked(run_dir)
        (run_dir / LOCK_FILE).unlink()
        with (
            holder(run_dir) as process,
            pytest.raises(UserError, match=rf"lock: was replaced .* process {process.pid}"),
        ):
            lock.check()
        shutil.rmtree(run_dir)
        assert lock.check() is None, "the next write reports the missing folder"
