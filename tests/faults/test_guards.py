"""Test hangs, slow ranks, values that are not finite, and ranks that differ in weights, configuration or code."""

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import rows
from tests.faults.conftest import EPOCHS, STEPS, Start, assert_same_run, status, wait_for_steps

STALLED, DIVERGED = 4, 3


@pytest.mark.parametrize("fault", ["stop", "hang"])
def test_a_stalled_rank_ends_the_job(start: Start, tmp_path: Path, fault: str) -> None:
    """Row 13: if a rank is stopped or hangs in a step, the job ends in time with all ranks' stacks on disk."""
    job = start(tmp_path / "run", "guards.stall_seconds=5", ranks=2, faults=f"1:4:{fault}")
    codes = job.wait(60)
    assert codes[0] == STALLED, job.stderr
    assert any("guards.stall_seconds=5" in line for line in job.errors)
    for rank in (0, 1):
        assert " in step\n" in (tmp_path / "run" / "stacks" / f"rank-{rank}.txt").read_text()
    assert start(tmp_path / "run", ranks=2).wait() == [0, 0], "the same command must resume"


@pytest.mark.parametrize("fault", ["stop-before-joining", "stop-in-start"])
def test_a_rank_that_stops_while_it_starts(start: Start, tmp_path: Path, fault: str) -> None:
    """Row 13: the other rank ends before the process group's timeout of 30 minutes, with its stacks on stderr."""
    job = start(tmp_path / "run", "guards.stall_seconds=8", ranks=2, faults=f"1:0:{fault}")
    assert job.wait(60)[0] == STALLED, job.stderr
    assert any("training had not begun" in line for line in job.errors)
    assert "in main\n" in job.stderr


def test_a_suspended_job_continues(start: Start, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    """Row 13: a run continues after all ranks were suspended for three times the limit, as by a closed lid."""
    job = start(tmp_path / "run", "guards.stall_seconds=3", ranks=2, faults="0:0:slow 1:0:slow")
    wait_for_steps(tmp_path / "run", 3)
    for number, pause in ((signal.SIGSTOP, 9), (signal.SIGCONT, 0)):
        for rank in (0, 1):
            job.signal(rank, number)
        time.sleep(pause)
    assert job.wait() == [0, 0], job.stderr
    assert_same_run(tmp_path / "run", undisturbed(2))


def test_a_slow_rank_is_named(start: Start, tmp_path: Path) -> None:
    """Row 14: a rank that takes 300 ms longer per step is named with its node at most rows of the log.

    tests/training/test_stragglers.py tests that equally fast ranks are not named.
    """
    job = start(tmp_path / "run", ranks=2, faults="1:0:slow-forward")
    assert job.wait() == [0, 0], job.stderr
    lines = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if " slow rank " in line]
    assert sum(f" rank 1 on {socket.gethostname()}: " in line for line in lines) > STEPS // 2


def test_one_nan_on_one_rank(start: Start, tmp_path: Path) -> None:
    """Row 15: all ranks skip and count the step, and training continues with finite weights."""
    options = ("guards.compare_ranks_every_steps=1", "augmentation.mix_group_size=4")
    job = start(tmp_path / "run", *options, ranks=2, faults="1:5:nan")
    assert job.wait() == [0, 0], job.stderr
    found = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in found] == [0] * 4 + [1] * (STEPS - 4)
    assert [row["step"] for row in found if row["loss"] is None] == [5]
    assert len(rows(tmp_path / "run", "validation")) == EPOCHS


def test_nan_for_long_ends_the_run(start: Start, tmp_path: Path) -> None:
    """Row 16: the fourth NaN step in a row ends the run with exit code 3; `best` and `last` predate it."""
    faults = " ".join(f"0:{step}:nan" for step in range(9, 19))
    job = start(tmp_path / "run", "guards.max_skipped_steps=4", faults=faults)
    assert job.wait() == [DIVERGED]
    assert "the last 4 steps had gradients that are not finite" in job.errors[0]
    saved = {name: (tmp_path / "run" / "checkpoints" / name).resolve().name for name in ("best", "last")}
    assert saved == {"best": "epoch-001", "last": "step-00000008"}
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_parameter_that_differs_is_named(start: Start, tmp_path: Path) -> None:
    """Row 17: a weight that changes by a millionth on rank 1 after step 7 is found at the next comparison."""
    job = start(tmp_path / "run", "guards.compare_ranks_every_steps=4", ranks=2, faults="1:7:perturb")
    assert DIVERGED in job.wait()
    assert "step 8: stages.2.blocks.0.mlp.fc1.weight on rank 1 is not what it is on rank 0" in job.errors[0]


def test_ranks_with_another_configuration(start: Start, tmp_path: Path) -> None:
    """Row 18: a different configuration is refused with the rank's number before anything is trained or written."""
    job = start(tmp_path / "run", ranks=2, faults="1:0:other-seed")
    assert 2 in job.wait()
    assert "rank 1: the configuration differs from rank 0's" in job.errors[0]
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_code(start: Start, tmp_path: Path) -> None:
    """Row 18: a different copy of the package on a rank is refused likewise."""
    job = start(tmp_path / "run", ranks=2, faults="1:0:other-code")
    assert 2 in job.wait()
    assert "rank 1: the code of metaformer" in job.errors[0]
    assert not (tmp_path / "run").exists()
