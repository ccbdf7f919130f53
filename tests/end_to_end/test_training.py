"""Tests of whole runs: reproducible, resumable, and independent of the number of processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import QUICK, REPOSITORY, SMALL_NETWORK, TRAIN_IMAGES, VAL_IMAGES, launch, rows

Run = Callable[..., dict[str, Any]]
STEPS_PER_EPOCH = TRAIN_IMAGES // 8


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Check that weights, EMA and trainer state are equal bit for bit."""
    names = sorted(file.name for file in a.iterdir())
    assert names == sorted(file.name for file in b.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            left, right = load_file(a / name), load_file(b / name)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left), name
    left, right = (torch.load(folder / "trainer.pt", weights_only=True) for folder in (a, b))
    torch.testing.assert_close(left["optimizer"]["state"], right["optimizer"]["state"], rtol=0, atol=0)
    assert left["progress"] == right["progress"]


def test_two_ranks_repeat_and_resume_bit_for_bit(images: Path, tmp_path: Path) -> None:
    """On two processes a repeated run has the same losses, and a resume after epoch 2 of 4 changes nothing."""
    common = (f"data.root={images}", "epochs=4", "ema=enabled", "ema.decay=0.9", *QUICK, *SMALL_NETWORK)
    whole, again, stopped = (tmp_path / name for name in ("whole", "again", "stopped"))
    first = launch("train", *common, f"run_dir={whole}", ranks=2)
    assert first.code == 0, first.stderr
    assert first.result["images"] == VAL_IMAGES
    assert launch("train", *common, f"run_dir={again}", ranks=2).code == 0
    assert [row["loss"] for row in rows(again)] == [row["loss"] for row in rows(whole)]
    assert len(rows(whole)) == 4 * STEPS_PER_EPOCH

    command = (*common, f"run_dir={stopped}")
    assert launch("train", *command, f"max_steps={2 * STEPS_PER_EPOCH}", ranks=2).code == 0
    assert len(rows(stopped, "validation")) == 2
    assert launch("train", *command, ranks=2).code == 0
    for kind in ("train", "validation"):
        assert rows(stopped, kind) == rows(whole, kind)
    assert_same_checkpoint(stopped / "checkpoints" / "last", whole / "checkpoints" / "last")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("loader=torch", "accumulation_steps=2", "clip_grad_norm=1.0"), id="torch"),
        pytest.param(("loader=dali", "precision=bf16", "schedule=cosine_per_step"), id="dali"),
        pytest.param(("loader=pil", "workers=0", "optimizer=lamb", "ema=enabled"), id="pil"),
    ],
)
def test_resumes_in_the_middle_of_an_epoch(images: Path, tmp_path: Path, run_program: Run, options: tuple[str]) -> None:
    """With every loader, a run resumed in the middle of an epoch ends like an uninterrupted one."""
    common = (f"data.root={images}", "epochs=2", "checkpoint.every_steps=3", *QUICK, *SMALL_NETWORK, *options)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_program("train", *common, f"run_dir={whole}")
    run_program("train", *common, f"run_dir={stopped}", f"max_steps={STEPS_PER_EPOCH + 2}")
    run_program("train", *common, f"run_dir={stopped}")
    assert rows(stopped) == rows(whole)
    assert_same_checkpoint(stopped / "checkpoints" / "last", whole / "checkpoints" / "last")


def test_ranks_and_accumulation_do_not_change_training(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Two processes, and one with two accumulation steps, have the losses of a single process."""
    same = ("model.drop_path_rate=0", "augmentation.mix_group_size=4")
    common = (f"data.root={images}", "epochs=2", *QUICK, *SMALL_NETWORK, *same)
    one, parts, two = (tmp_path / name for name in ("one", "parts", "two"))
    run_program("train", *common, f"run_dir={one}")
    run_program("train", *common, f"run_dir={parts}", "accumulation_steps=2")
    distributed = launch("train", *common, f"run_dir={two}", ranks=2)
    assert distributed.code == 0
    assert "Warning" not in distributed.stderr
    expected = [row["loss"] for row in rows(one)]
    assert [row["loss"] for row in rows(parts)] == pytest.approx(expected, rel=1e-4)
    assert [row["loss"] for row in rows(two)] == pytest.approx(expected, rel=1e-4)


def test_killed_run_resumes_from_its_last_checkpoint(images: Path, tmp_path: Path, run_program: Run) -> None:
    """After SIGKILL the same command resumes from the last saved step; lost rows are superseded, not duplicated."""
    common = (f"data.root={images}", "epochs=3", "checkpoint.every_steps=4", *QUICK, f"run_dir={tmp_path / 'run'}")
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *common], stdout=subprocess.DEVNULL, start_new_session=True
    )
    metrics, last = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints" / "last"
    deadline = time.monotonic() + 120
    while not last.exists() or len(metrics.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_program("train", *common)["epoch"] == 3
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 3 * STEPS_PER_EPOCH + 1))


def test_complete_run_is_not_trained_again(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Repeating the command of a complete run trains nothing and prints the same result."""
    command = (f"data.root={images}", "epochs=1", *QUICK, *SMALL_NETWORK, f"run_dir={tmp_path / 'run'}")
    first = run_program("train", *command)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run_program("train", *command) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_learns(images: Path, tmp_path: Path, run_program: Run) -> None:
    """A network learns to distinguish the coloured classes within a few epochs; a timm network trains too."""
    common = (f"data.root={images}", *QUICK, "augmentation=none", "epochs=6", "model.drop_path_rate=0")
    ours = run_program("train", *common, "optimizer.lr=2e-3", f"run_dir={tmp_path / 'ours'}")
    assert ours["best_top1"] > 60
    resnet = ("model=timm", "model.name=resnet10t", "model.drop_path_rate=null", "epochs=3")
    timm = run_program("train", *common, *resnet, f"run_dir={tmp_path / 'timm'}")
    assert timm["images"] == VAL_IMAGES
