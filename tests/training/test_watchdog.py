"""Test the watchdog in separate processes: hangs end with all stacks on disk, and progress is not disturbed."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NoReturn

import pytest

import train
from metaformer.training.watchdog import COMPILE_SECONDS, EXIT_CODE, Watchdog

PRELUDE = """
import ctypes, os, shutil, sys, time
from contextlib import contextmanager
from pathlib import Path
from metaformer.training import watchdog
from metaformer.training.watchdog import Watchdog
watchdog.DUMP_SECONDS = 0.3
folder, stall = Path(sys.argv[1]), float(sys.argv[2])
peers = [int(pid) for pid in sys.argv[3:]]

@contextmanager
def watching(rank, is_asked_to_stop=lambda: False):
    dog = Watchdog(rank, stall)
    with dog.watching():
        dog.training_begins(folder, peers, is_asked_to_stop)
        yield dog
"""
HANGS = """
def waits_for_somebody():
    time.sleep(60)
with watching(0):
    waits_for_somebody()
"""
PEER = """
def is_stopped():
    print("ready", flush=True)
    while True:
        dog.beat()
        time.sleep(0.01)
with watching(1) as dog:
    is_stopped()
"""


def start(script: str, folder: Path, stall: float, *peers: int) -> subprocess.Popen[str]:
    program = PRELUDE + textwrap.dedent(script)
    command = [sys.executable, "-c", program, str(folder), str(stall), *map(str, peers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit code and stderr."""
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


def test_a_hang_ends_with_stacks(tmp_path: Path) -> None:
    """A hang gives exit code 4, a one-line error, and the hanging function in the rank's stacks file."""
    began = time.monotonic()
    code, stderr = finish(start(HANGS, tmp_path / "run" / "stacks", 0.5))
    assert code == EXIT_CODE == 4
    assert time.monotonic() - began > 0.5
    (line,) = stderr.splitlines()
    assert line.startswith("error: rank 0: no step for ")
    assert "guards.stall_seconds=0.5" in line
    assert str(tmp_path / "run" / "stacks") in line
    assert "waits_for_somebody" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()


def test_progress_is_not_disturbed(tmp_path: Path) -> None:
    """A process with regular beats ends by itself and leaves neither file nor folder."""
    code, stderr = finish(
        start(
            """
            with watching(0) as dog:
                for _ in range(40):
                    dog.beat()
                    time.sleep(stall / 10)
            time.sleep(2 * stall)
            sys.exit(7)
            """,
            tmp_path / "stacks",
            0.5,
        )
    )
    assert (code, stderr) == (7, "")
    assert not (tmp_path / "stacks").exists()


def test_time_before_watching_does_not_count(tmp_path: Path) -> None:
    """The limit starts with watching, not with the creation of the watchdog."""
    dog = Watchdog(0, 0.5)
    time.sleep(0.8)
    with dog.watching():
        time.sleep(0.2)


def test_a_hang_in_the_start(tmp_path: Path) -> None:
    """Before training has begun and has a folder, the stacks are on stderr.

    A pause for one rank's long work is not a hang, but a hang after it is detected.
    """
    script = """
        def hangs():
            time.sleep(60)
        dog = Watchdog(0, stall)
        with dog.watching():
            with dog.pause():
                with dog.pause():
                    pass
                time.sleep(3 * stall)
            print("paused", flush=True)
            hangs()
        """
    process = start(script, tmp_path, 0.5)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (EXIT_CODE, "paused\n")
    assert "in hangs" in stderr
    assert stderr.splitlines()[-1].startswith("error: rank 0: no step for ")
    assert "training had not begun" in stderr


def test_no_pause_in_training(tmp_path: Path) -> None:
    """During training, unlike in the start, a pause is watched."""
    script = """
        with watching(0) as dog, dog.pause():
            time.sleep(60)
        """
    assert finish(start(script, tmp_path, 0.5))[0] == EXIT_CODE


def test_nothing_is_expected_after_training(tmp_path: Path) -> None:
    """After training, for example during uploads, no beats are required."""
    script = """
        with watching(0) as dog:
            dog.training_ends()
            time.sleep(4 * stall)
        """
    assert finish(start(script, tmp_path, 0.5)) == (0, "")


COMPILING = """
watchdog.COMPILE_SECONDS, watchdog.BACKSTOP_SECONDS = 2.0, 0.1
asked = []
dog = Watchdog(0, stall, compiles=True)
with dog.watching():
    dog.training_begins(folder, [], lambda: bool(asked))
    with dog.compiling("validation"):
        time.sleep(0.75)
    dog.beat()
    with dog.step():
        time.sleep(0.75)
    dog.beat()
    print("compiled", flush=True)
"""


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("time.sleep(0.1)", 0),
        ("with dog.step(): time.sleep(60)", EXIT_CODE),
        ("with dog.compiling('validation'): time.sleep(60)", EXIT_CODE),
        ("with dog.compiling('another kind'): time.sleep(60)", EXIT_CODE),
    ],
)
def test_compiling_has_an_allowance(tmp_path: Path, then: str, code: int) -> None:
    """The first step and the first validation may exceed the limit together by `COMPILE_SECONDS`, others may not."""
    process = start(COMPILING + textwrap.indent(then, "    "), tmp_path, 0.5)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (code, "compiled\n"), stderr
    assert time.monotonic() - began < 20


def test_without_compiling_there_is_no_allowance(tmp_path: Path) -> None:
    """The first step of a network that is not compiled has the usual limit."""
    process = start(COMPILING.replace("compiles=True", "compiles=False"), tmp_path, 0.5)
    assert (*process.communicate(timeout=30)[:1], process.returncode) == ("", EXIT_CODE)


@pytest.mark.parametrize(("value", "seconds"), [("true", COMPILE_SECONDS), ("false", 0.0)])
def test_compile_selects_the_allowance(monkeypatch: pytest.MonkeyPatch, value: str, seconds: float) -> None:
    """train.py gives the watchdog the allowance if `compile` is set."""
    allowances: list[float] = []

    def note(dog: Watchdog) -> NoReturn:
        allowances.append(dog._allowance)
        raise KeyboardInterrupt

    monkeypatch.setattr(Watchdog, "watching", note)
    monkeypatch.setattr(sys, "argv", ["train.py", f"compile={value}"])
    with pytest.raises(KeyboardInterrupt):
        train.main()
    assert allowances == [seconds]


def test_a_stop_request_ends_the_allowance(tmp_path: Path) -> None:
    """A rank that is asked to stop while it compiles does not take the rest of the allowance."""
    script = (
        COMPILING.replace("= 2.0,", "= 60.0,")
        + """
    watchdog.STOP_SECONDS = 0.5
    asked.append(True)
    with dog.compiling("another kind"):
        time.sleep(60)
"""
    )
    code, stderr = finish(start(script, tmp_path, 0.5))
    assert code == EXIT_CODE
    assert "it was asked to stop" in stderr


@pytest.mark.parametrize(("step", "least", "most"), [(0.1, 0.5, 2.5), (1.0, 1.9, 5.5)], ids=["quick", "slow"])
def test_a_stop_request_shortens_the_limit(tmp_path: Path, step: float, least: float, most: float) -> None:
    """A rank that was asked to stop and waits for others has a limit of three steps, but at least `STOP_SECONDS`.

    Saves and validation batches between the steps may be shorter.
    """
    script = f"""
        watchdog.STOP_SECONDS = 0.5
        asked = []
        with watching(0, is_asked_to_stop=lambda: bool(asked)) as dog:
            for _ in range(3):
                with dog.step():
                    time.sleep({step})
                dog.beat()
                dog.beat()
            asked.append(True)
            began = time.monotonic()
            ended = os._exit
            def end(code):
                print(time.monotonic() - began, flush=True)
                ended(code)
            os._exit = end
            time.sleep(60)
        """
    process = start(script, tmp_path, 60)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODE
    assert least < float(stdout) < most
    assert "it was asked to stop, and waited for data or for another rank" in stderr


def test_a_stopped_peer_writes_its_stacks(tmp_path: Path) -> None:
    """A rank under SIGSTOP cannot watch itself: the waiting rank makes it write its stacks, and ends the job."""
    peer = start(PEER, tmp_path, 60.0)
    assert peer.stdout is not None
    assert peer.stdout.readline() == "ready\n"
    peer.send_signal(signal.SIGSTOP)
    try:
        code, _ = finish(start(HANGS, tmp_path, 0.5, peer.pid))
        assert code == EXIT_CODE
        assert "waits_for_somebody" in (tmp_path / "rank-0.txt").read_text()
        assert "is_stopped" in (tmp_path / "rank-1.txt").read_text()
        assert peer.poll() is None, "it must only write; the launcher ends it"
    finally:
        peer.kill()
        peer.communicate()


def test_a_peer_that_has_ended(tmp_path: Path) -> None:
    """The process ID of a peer that has ended does not prevent the job from ending."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code, stderr = finish(start(HANGS, tmp_path, 0.5, gone.pid))
    assert code == EXIT_CODE
    assert len(stderr.splitlines()) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_a_process_of_another_user(tmp_path: Path) -> None:
    """A process ID reused by another user's process does not prevent the end of the job, and that process is spared."""
    other = subprocess.Popen(["sleep", "30"])
    script = """
        with watching(0):
            os.setuid(65534)
            time.sleep(60)
        """
    code, stderr = finish(start(script, tmp_path, 0.5, other.pid))
    assert other.poll() is None
    other.kill()
    other.wait()
    assert code == EXIT_CODE
    assert len(stderr.splitlines()) == 1


def test_threads_that_cannot_run(tmp_path: Path) -> None:
    """A rank that hangs in C and blocks its other threads is killed from outside after its stacks are written."""
    code, _ = finish(
        start(
            """
            watchdog.BACKSTOP_SECONDS = 0.3
            def hangs_in_c():
                mutex = ctypes.create_string_buffer(64)
                for _ in range(2):  # a deadlock
                    ctypes.PyDLL(None).pthread_mutex_lock(mutex)
            with watching(0):
                hangs_in_c()
            """,
            tmp_path,
            0.5,
        )
    )
    assert code == -signal.SIGKILL
    assert "hangs_in_c" in (tmp_path / "rank-0.txt").read_text()


def test_beats_reach_the_backstop(tmp_path: Path) -> None:
    """The backstop, which kills a process whose threads cannot run, also counts from the last beat."""
    script = """
        watchdog.BACKSTOP_SECONDS = 0.1
        with watching(0) as dog:
            for _ in range(30):
                dog.beat()
                time.sleep(stall / 10)
        """
    assert finish(start(script, tmp_path, 0.5)) == (0, "")


@pytest.mark.parametrize("with_backstop", [True, False], ids=["the process group", "the process alone"])
def test_a_suspend_is_no_stall(tmp_path: Path, with_backstop: bool) -> None:
    """A healthy process that is suspended for several times the limit, as by a closed lid, continues afterwards."""
    script = """
        watchdog.BACKSTOP_SECONDS = 0.1
        with watching(0) as dog:
            print("ready", flush=True)
            for _ in range(40):
                dog.beat()
                time.sleep(stall / 10)
        """
    program = PRELUDE + textwrap.dedent(script)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), "1.0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    send = os.killpg if with_backstop else os.kill
    send(process.pid, signal.SIGSTOP)
    time.sleep(4)
    send(process.pid, signal.SIGCONT)
    assert finish(process) == (0, "")


def test_stop_signals_do_not_end_the_backstop(tmp_path: Path) -> None:
    """A launcher's signal to the process group does not end the backstop of a rank that is still saving."""
    script = """
        import signal
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        watchdog.BACKSTOP_SECONDS = 0.3
        def hangs_in_c():
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        os.setpgid(0, 0)
        with watching(0):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                os.killpg(0, number)
            hangs_in_c()
        """
    code, _ = finish(start(script, tmp_path, 0.5))
    assert code == -signal.SIGKILL


def test_nobody_reads_stderr(tmp_path: Path) -> None:
    """A process whose launcher has died and closed its pipe still ends with the same exit code."""
    process = start(HANGS, tmp_path, 0.5)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    assert process.wait(30) == EXIT_CODE


@pytest.mark.parametrize("left", ["nothing", "vanished", "an earlier hang's stacks"])
def test_the_end_of_watching_hides_no_error(tmp_path: Path, left: str) -> None:
    """The error that ends training is raised even if the run folder is gone; only stacks of earlier hangs are kept."""
    folder = tmp_path / "run" / "stacks"
    folder.mkdir(parents=True)
    if left == "an earlier hang's stacks":
        (folder / "rank-0.txt").write_text(left)

    def fail() -> None:
        dog = Watchdog(0, 60)
        with dog.watching():
            dog.training_begins(folder, [], lambda: False)
            if left == "vanished":
                shutil.rmtree(tmp_path / "run")
            raise KeyError("cause")

    with pytest.raises(KeyError, match="cause"):
        fail()
    kept = {file.name: file.read_text() for file in (tmp_path / "run").rglob("*.txt")}
    assert kept == ({"rank-0.txt": left} if left == "an earlier hang's stacks" else {})
    assert folder.exists() == bool(kept)
