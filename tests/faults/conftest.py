"""Fixtures for runs with faults: real processes, real signals, a small PoolFormer, real JPEGs."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN, QUICK, REPOSITORY, TRAIN_IMAGES, rows
from tests.end_to_end.test_training import assert_same_checkpoint
from tests.faults.program import run_as
from tests.fork_server import ForkedProcess
from tests.warm import python

STEPS_PER_EPOCH = TRAIN_IMAGES // 8
EPOCHS = 3
STEPS = EPOCHS * STEPS_PER_EPOCH
RECIPE = (*QUICK, f"epochs={EPOCHS}", "ema=enabled", "ema.decay=0.9", "checkpoint.every_steps=2", "workers=0")
INTERRUPTED = 75
TIMEOUT = 120
GRACE = 8.0  # seconds; rank 0 reports an error before the other ranks


@dataclass
class Job:
    """The ranks of a run."""

    processes: list[ForkedProcess]
    log: Path

    def wait(self, timeout: float = TIMEOUT) -> list[int | None]:
        """Return the ranks' exit codes; end the other ranks after one has failed, as torchrun does."""
        deadline, failed_at = time.monotonic() + timeout, 0.0
        while any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, f"still running after {timeout} s: {self.stderr[-3000:]}"
            if any(process.exitcode for process in self.processes):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > GRACE:
                    self.end()
            time.sleep(0.02)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self) -> None:
        """Kill all ranks that are still running."""
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def stderr(self) -> str:
        """Return the stderr of all ranks."""
        return "".join(file.read_text() for file in sorted(self.log.parent.glob(f"{self.log.name}-*.err")))

    @property
    def errors(self) -> list[str]:
        """Return the error lines on stderr."""
        return [line for line in self.stderr.splitlines() if line.startswith(("error: ", "interrupted: "))]


Start = Callable[..., Job]


@pytest.fixture
def start(images: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts train.py's ranks like torchrun, from a process that has imported everything."""
    jobs: list[Job] = []

    def begin(
        run_dir: Path, *overrides: str, ranks: int = 1, faults: str = "", variables: dict[str, str] | None = None
    ) -> Job:
        environment = {"FAULTS": faults} | (variables or {})
        argv = [f"data.root={images}", *RECIPE, f"run_dir={run_dir}", *overrides]
        log, port = tmp_path / f"job{len(jobs)}", free_port()
        processes = []
        for rank in range(ranks):
            arguments = (rank, ranks, port, argv, environment, tmp_path / f"{log.name}-{rank}")
            processes.append(ForkedProcess(target=run_as, args=arguments))
            processes[-1].start()
        jobs.append(Job(processes, log))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


Run = Callable[..., Path]


@pytest.fixture
def run(start: Start) -> Run:
    """Return a function that trains to the end and returns the run folder."""

    def whole(run_dir: Path, *overrides: str, ranks: int = 1) -> Path:
        job = start(run_dir, *overrides, ranks=ranks)
        assert job.wait() == [0] * ranks, job.stderr
        return run_dir

    return whole


@pytest.fixture(scope="session")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that returns the run folder of an undisturbed run on the given number of ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run_dir_for(ranks: int) -> Path:
        run_dir = folder / str(ranks)
        if not run_dir.exists():
            done = launch_torchrun(images, run_dir, ranks=ranks, warm=True)
            assert done.wait(TIMEOUT) == 0, (folder / f"{run_dir.name}.err").read_text()[-3000:]
        return run_dir

    return run_dir_for


def launch_torchrun(
    images: Path,
    run_dir: Path,
    *overrides: str,
    ranks: int = 2,
    faults: str = "",
    options: tuple[str, ...] = (),
    program: Path = REPOSITORY / "tests" / "faults" / "program.py",
    warm: bool = False,
) -> "subprocess.Popen[bytes]":
    """Start the same program through torchrun in a new session, with output to RUN.out and RUN.err.

    Args:
        warm: Start the interpreters of tests/warm: for runs that nothing disturbs.
    """
    command = [*([python()] if warm else []), str(BIN / "torchrun"), *(options or ("--standalone",))]
    command += [f"--nproc_per_node={ranks}", *(["--no-python", python()] if warm else [])]
    command += [str(program), f"data.root={images}", *RECIPE]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FAULTS": faults}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with Path(f"{run_dir}.out").open("ab") as out, Path(f"{run_dir}.err").open("ab") as err:
        return subprocess.Popen(
            [*command, f"run_dir={run_dir}", *overrides],
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Assert that two runs have bit-identical checkpoints and rows, and that no temporary files remain."""
    for kind in ("train", "validation"):
        assert rows(run_dir, kind) == rows(expected, kind)
    for name in ("last", "best"):
        assert_same_checkpoint(run_dir / "checkpoints" / name, expected / "checkpoints" / name)
    assert list(run_dir.rglob("*.tmp")) == []
    assert status(run_dir)["state"] == "done"


def status(run_dir: Path) -> dict[str, Any]:
    """Return the content of RUN/status.json."""
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content


def wait_for_steps(run_dir: Path, steps: int, timeout: float = TIMEOUT) -> None:
    """Wait until this many train rows are logged."""
    deadline = time.monotonic() + timeout
    while not (run_dir / "metrics.jsonl").exists() or len(rows(run_dir)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
