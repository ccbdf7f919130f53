"""Test stopping at any moment through any rank, and resuming with an identical result."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import VAL_IMAGES, rows
from tests.faults.conftest import (
    INTERRUPTED,
    STEPS,
    STEPS_PER_EPOCH,
    Run,
    Start,
    assert_same_run,
    launch_torchrun,
    status,
    wait_for_steps,
)

Undisturbed = Callable[[int], Path]


@pytest.mark.parametrize(
    ("ranks", "step"),
    [
        *((ranks, step) for ranks in (1, 2) for step in (STEPS_PER_EPOCH + 3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1)),
        (4, STEPS_PER_EPOCH + 3),  # with three or more terms, the order of a sum matters
    ],
)
def test_stopped_and_resumed_is_bit_for_bit_the_same(
    start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path, ranks: int, step: int
) -> None:
    """Rows 1 and 9: SIGTERM within an epoch, at its end or one step later gives exit code 75, and the run resumes."""
    job = start(tmp_path / "run", ranks=ranks, faults=f"0:{step}:term")
    codes = job.wait()
    assert codes[0] == INTERRUPTED, job.stderr
    stopped = status(tmp_path / "run")
    assert stopped["state"] == "interrupted"
    assert stopped["step"] in (step, step + 1), "all ranks must stop one step after the signal at the latest"
    assert f"step {stopped['step']} is saved" in job.errors[0]
    run(tmp_path / "run", ranks=ranks)
    assert_same_run(tmp_path / "run", undisturbed(ranks))


@pytest.mark.parametrize(("number", "rank"), [("usr1", 1), ("usr1", 0), ("int", 1), ("hup", 1)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path, number: str, rank: int
) -> None:
    """Row 10: if only one of two ranks gets a signal, both stop at the same step with exit code 75."""
    job = start(tmp_path / "run", ranks=2, faults=f"{rank}:4:{number}")
    assert job.wait() == [INTERRUPTED, INTERRUPTED], job.stderr
    (line,) = job.errors
    assert f"step {status(tmp_path / 'run')['step']} is saved" in line
    run(tmp_path / "run", ranks=2)
    assert_same_run(tmp_path / "run", undisturbed(2))


@pytest.mark.parametrize("moment", ["term-in-backward", "term-in-validation", "term-in-save"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_at_any_moment(
    start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path, moment: str, ranks: int
) -> None:
    """Row 11: a signal may arrive during the backward pass, a validation or a save."""
    step = STEPS_PER_EPOCH if moment == "term-in-validation" else 4
    job = start(tmp_path / "run", ranks=ranks, faults=f"0:{step}:{moment}")
    assert job.wait()[0] == INTERRUPTED, job.stderr
    stopped = status(tmp_path / "run")
    assert stopped["state"] == "interrupted"
    if moment == "term-in-validation":
        assert stopped["step"] == STEPS_PER_EPOCH
        assert rows(tmp_path / "run", "validation") == [], "the validation must be interrupted"
    run(tmp_path / "run", ranks=ranks)
    assert_same_run(tmp_path / "run", undisturbed(ranks))


def test_repeated_signals_change_nothing(start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Row 12: repeated signals, as launchers send them, and a Ctrl-C that arrives twice cause one orderly stop."""
    job = start(tmp_path / "run", faults="0:0:slow")
    wait_for_steps(tmp_path / "run", 3)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        job.signal(0, number)
    assert job.wait() == [INTERRUPTED], job.stderr
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(1))


def test_grace_too_short(start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Row 12: after SIGTERM and immediate SIGKILL, the run resumes from the last checkpoint with the same result."""
    job = start(tmp_path / "run", ranks=2, faults="0:0:slow 1:0:slow")
    wait_for_steps(tmp_path / "run", 5)
    for rank in (0, 1):
        job.signal(rank, signal.SIGTERM)
        job.signal(rank, signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL] * 2
    assert status(tmp_path / "run")["state"] == "running", "this tells a script that the run was killed"
    run(tmp_path / "run", ranks=2)
    assert_same_run(tmp_path / "run", undisturbed(2))


def test_stopped_while_waiting_for_data(start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Row 12a: SIGTERM while waiting for data saves the last step at once."""
    job = start(tmp_path / "run", faults="0:4:no-data")
    wait_for_steps(tmp_path / "run", 3)
    job.signal(0, signal.SIGTERM)
    assert job.wait(20) == [INTERRUPTED], job.stderr
    assert status(tmp_path / "run")["step"] == 3
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(1))


def test_ranks_stopped_while_one_waits_for_data(
    start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Row 12a: two ranks that cannot agree to save end with their stacks before a launcher would kill them."""
    job = start(tmp_path / "run", ranks=2, faults="1:4:no-data")
    wait_for_steps(tmp_path / "run", 3)
    for rank in (0, 1):
        job.signal(rank, signal.SIGTERM)
    assert 4 in job.wait(28), job.stderr
    assert any("asked to stop" in line for line in job.errors)
    run(tmp_path / "run", ranks=2)
    assert_same_run(tmp_path / "run", undisturbed(2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_to_torchrun(images: Path, undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals) -> None:
    """Row 9: torchrun forwards SIGTERM and SIGHUP; the status file shows the interruption, its exit code does not."""
    run_dir = tmp_path / "run"
    agent = launch_torchrun(images, run_dir, "workers=1", faults="0:0:slow 1:0:slow")
    wait_for_steps(run_dir, 3)
    agent.send_signal(number)
    assert agent.wait(60) != 0
    assert status(run_dir)["state"] == "interrupted"
    assert launch_torchrun(images, run_dir, "workers=1", warm=True).wait(120) == 0
    assert_same_run(run_dir, undisturbed(2))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(start: Start, run: Run, tmp_path: Path, before: int, after: int) -> None:
    """Row 20: with a fixed mixing group, resuming on another number of ranks gives the same losses within rounding."""
    options = ("augmentation.mix_group_size=4", "model.drop_path_rate=0")
    whole = run(tmp_path / "whole", *options)
    job = start(tmp_path / "run", *options, ranks=before, faults=f"0:{STEPS_PER_EPOCH + 2}:term")
    assert job.wait()[0] == INTERRUPTED
    run(tmp_path / "run", *options, ranks=after)
    found, expected = rows(tmp_path / "run"), rows(whole)
    assert len(found) == STEPS
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert [row["images"] for row in rows(tmp_path / "run", "validation")] == [VAL_IMAGES] * 3
    assert f"changed      ranks: {before} -> {after}\n" in (tmp_path / "run" / "log.txt").read_text()


def test_a_second_ctrl_c(start: Start, tmp_path: Path) -> None:
    """A second Ctrl-C after two seconds ends a rank that hangs in a step at once."""
    job = start(tmp_path / "run", faults="0:3:hang")
    wait_for_steps(tmp_path / "run", 2)
    time.sleep(0.3)
    job.signal(0, signal.SIGINT)
    time.sleep(2.2)
    job.signal(0, signal.SIGINT)
    assert job.wait(10) == [128 + signal.SIGINT]


def test_stopped_before_the_first_step(start: Start, tmp_path: Path) -> None:
    """Repeated SIGTERM before the first step is an orderly stop that does not count as a failed start."""
    for _ in range(2):
        job = start(tmp_path / "run", "guards.max_starts_without_progress=1", faults="0:0:term-in-start")
        assert job.wait() == [INTERRUPTED], job.stderr
        assert job.errors == ["interrupted: SIGTERM: before the first step; run the same command again"]
        assert status(tmp_path / "run")["state"] == "interrupted"
        assert status(tmp_path / "run")["starts_without_progress"] == 0
