"""Test runs whose ranks, launcher or node are killed, at random steps, during a save, and repeatedly."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, rows
from tests.faults.conftest import (
    STEPS,
    Run,
    Start,
    assert_same_run,
    free_port,
    launch_torchrun,
    status,
    wait_for_steps,
)

Undisturbed = Callable[[int], Path]


def check_restart(images: Path, tmp_path: Path, undisturbed: Undisturbed, seed: int) -> None:
    """Kill one of two ranks at a random step; torchrun restarts both, and the result is that of an undisturbed run."""
    rng = random.Random(seed)
    run_dir = tmp_path / f"run{seed}"
    # If the step was not saved yet, the restarted rank reaches it again; "kill-once" does not kill it a second time.
    step, rank = rng.randrange(1, STEPS), rng.randrange(2)
    options = ("--standalone", "--max-restarts=1")
    agent = launch_torchrun(images, run_dir, "checkpoint.every_steps=1", faults=f"{rank}:{step + 1}:kill-once",
                            options=options)  # fmt: skip
    assert agent.wait(180) == 0, Path(f"{run_dir}.err").read_text()[-3000:]
    assert status(run_dir)["started_at_step"] in (step - 1, step), "at most one step may be lost"
    assert_same_run(run_dir, undisturbed(2))


@pytest.mark.parametrize("seed", [0])
def test_a_killed_rank(images: Path, tmp_path: Path, undisturbed: Undisturbed, seed: int) -> None:
    """Row 2, with one seed."""
    check_restart(images, tmp_path, undisturbed, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_killed_rank_with_twenty_seeds(images: Path, tmp_path: Path, undisturbed: Undisturbed, seed: int) -> None:
    """Row 2, with twenty seeds."""
    check_restart(images, tmp_path, undisturbed, seed)


def test_a_killed_launcher_leaves_no_orphan(images: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """Row 3: after SIGKILL to torchrun, its ranks save and end within a step, and the same command resumes."""
    run_dir = tmp_path / "run"
    agent = launch_torchrun(images, run_dir, "workers=1", faults="0:0:slow 1:0:slow")
    wait_for_steps(run_dir, 3)
    agent.kill()
    agent.wait()
    assert_all_end(run_dir, 30)
    assert status(run_dir)["state"] == "interrupted"
    assert launch_torchrun(images, run_dir, warm=True).wait(120) == 0
    assert_same_run(run_dir, undisturbed(2))


@pytest.mark.parametrize("seconds", [0.0, 1.0, 4.0])
def test_a_launcher_killed_while_its_ranks_start(images: Path, tmp_path: Path, seconds: float) -> None:
    """Row 3: if torchrun is killed during the start, no rank trains on or waits for the others."""
    run_dir = tmp_path / "run"
    agent = launch_torchrun(images, run_dir, "epochs=1000", program=REPOSITORY / "train.py")
    while len(processes_of(run_dir)) < 3:
        time.sleep(0.01)
    time.sleep(seconds)
    agent.kill()
    agent.wait()
    assert_all_end(run_dir, 60)


def assert_all_end(run_dir: Path, seconds: float) -> None:
    """Assert that all processes of the run end within this many seconds."""
    deadline = time.monotonic() + seconds
    while processes_of(run_dir):
        assert time.monotonic() < deadline, processes_of(run_dir)
        time.sleep(0.1)


def processes_of(run_dir: Path) -> list[str]:
    """Return the processes whose command contains the run folder."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"run_dir={run_dir}" in line]


@pytest.mark.parametrize("step", [2, 6])
def test_killed_in_the_middle_of_a_save(
    start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path, step: int
) -> None:
    """Row 4: after SIGKILL between writing and renaming a checkpoint, the run resumes from the previous one, if any.

    tests/training/test_checkpoint.py tests every other moment of a save.
    """
    job = start(tmp_path / "run", faults=f"0:{step}:kill-in-save")
    assert job.wait() == [-signal.SIGKILL]
    assert list((tmp_path / "run" / "checkpoints").glob(".step*.tmp" if step == 2 else ".epoch*.tmp"))
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(1))


def test_one_of_two_nodes_is_lost(images: Path, tmp_path: Path) -> None:
    """Row 22: if one of two nodes is killed, the other ends by itself, and the run can resume on one node."""
    run_dir, port = tmp_path / "run", free_port()
    rendezvous = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7")
    options = ("augmentation.mix_group_size=4", "model.drop_path_rate=0")
    nodes = [
        launch_torchrun(images, run_dir, *options, ranks=1, faults="0:0:slow 1:0:slow", options=(*rendezvous, host))
        for host in ("--local_addr=127.0.0.1", "--local_addr=127.0.0.2")
    ]
    wait_for_steps(run_dir, 4)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    nodes[1].wait()
    assert nodes[0].wait(90) != 0
    assert processes_of(run_dir) == []
    before = len(rows(run_dir))
    assert launch_torchrun(images, run_dir, *options, ranks=1, warm=True).wait(120) == 0
    assert len(rows(run_dir)) == STEPS
    assert status(run_dir)["started_at_step"] >= before - 2, "saving every second step, at most two steps may be lost"


def test_a_crash_loop_ends(start: Start, tmp_path: Path) -> None:
    """Row 23: starts that die before saving are counted, and after three in a row a start is refused."""
    options = ("checkpoint.every_steps=4", "checkpoint.background=false", "guards.max_starts_without_progress=3")
    for attempt in range(4):  # the first makes progress
        job = start(tmp_path / "run", *options, faults="0:7:kill")
        assert job.wait() == [-signal.SIGKILL], f"attempt {attempt}: {job.stderr}"
    for _ in range(2):
        job = start(tmp_path / "run", *options)
        assert job.wait() == [2]
        assert "3 starts in a row have ended without a checkpoint after step 6" in job.errors[0]
    (tmp_path / "run" / "status.json").unlink()
    assert start(tmp_path / "run", *options).wait() == [0]
