"""Tests of TensorBoard tracking, with event files that are read back by TensorBoard's own reader."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaformer.errors import UserError
from metaformer.tracking import make
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.tensorboard import TensorBoardTracker, check_tensorboard
from tests.tracking.test_console import train_row

TRAIN_FIGURES = {"loss", "lr", "grad_norm", "images_per_second", "data_wait", "skipped_steps", "memory_gib"}


def validation_row(step: int, top1: float, kind: str = "validation") -> dict[str, Any]:
    figures = {"top1": top1, "top5": 75.0, "loss": 1.5, "images": 403}
    return {"kind": kind, "epoch": 1, "step": step, "samples": 8 * step} | figures


def read(run_dir: Path, kind: str) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard" / kind)).Reload()


def values(run_dir: Path, kind: str, name: str) -> list[tuple[int, float]]:
    """Return the step and value of each point of a curve."""
    return [(event.step, round(event.value, 4)) for event in read(run_dir, kind).Scalars(name)]


def start(run_dir: Path, *rows: dict[str, Any], resumed_at: int = 0, validated: bool = False) -> None:
    """Record rows as one start of a run does."""
    tracker = TensorBoardTracker()
    tracker.open(run_dir, resumed_at, validated, None)
    for row in rows:
        tracker.metrics(row)
    tracker.close(failed=False)


def test_through_its_own_process_beside_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb and TensorBoard at once: both have the rows; TensorBoard has all figures and the image."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    console = ConsoleTracker(epochs=1, steps=20, samples_per_step=8, log_file=tmp_path / "log.txt")
    config = TrackingConfig(WandbMode.offline, tensorboard=True)
    tracker = make.make_tracker(config, tmp_path, console, resumed_at=0, settings={"a": 1})
    picture = tmp_path / "mixed_images.png"
    Image.fromarray(np.full((6, 4, 3), 200, np.uint8)).save(picture)
    tracker.picture("train/mixed_images", picture)
    tracker.metrics(train_row(10, loss=1.25))
    tracker.metrics(train_row(20, loss=float("nan"), lr=2e-3))
    tracker.metrics(validation_row(20, top1=25.0))
    tracker.close(failed=False)

    found = read(tmp_path, "train")
    assert set(found.Tags()["scalars"]) == TRAIN_FIGURES
    assert values(tmp_path, "train", "lr") == [(10, 0.004), (20, 0.002)]
    assert [str(value) for _, value in values(tmp_path, "train", "loss")] == ["1.25", "nan"]
    (image,) = found.Images("train/mixed_images")
    assert (image.step, image.height, image.width) == (0, 6, 4)
    assert set(read(tmp_path, "validation").Tags()["scalars"]) == {"top1", "top5", "loss", "images"}
    assert values(tmp_path, "validation", "top1") == [(20, 25.0)]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("validated", [True, False])
def test_a_resume_repeats_no_step(validated: bool, tmp_path: Path) -> None:
    """Steps after the checkpoint are replaced, and its own validation is too unless the checkpoint has it."""
    start(tmp_path, train_row(10), train_row(20), validation_row(20, 25.0), train_row(30, loss=9.0))
    again = [] if validated else [validation_row(20, 26.0)]
    start(tmp_path, *again, train_row(30), validation_row(40, 30.0), resumed_at=20, validated=validated)
    assert values(tmp_path, "train", "loss") == [(10, 1.25), (20, 1.25), (30, 1.25)]
    assert values(tmp_path, "validation", "top1") == [(20, 25.0 if validated else 26.0), (40, 30.0)]


def test_a_restarted_process_repeats_no_row(tmp_path: Path) -> None:
    """After a failure of its process, the tracker receives all rows of the start again."""
    start(tmp_path, train_row(10), train_row(20))
    start(tmp_path, train_row(10), train_row(20), train_row(30))
    assert [step for step, _ in values(tmp_path, "train", "loss")] == [10, 20, 30]


def test_the_final_row_is_the_last_validation(tmp_path: Path) -> None:
    """The final row is a point of the curve if the run ends within an epoch, once even if it is written again."""
    final = validation_row(20, 25.0, kind="final")
    start(tmp_path, validation_row(10, 20.0), validation_row(20, 25.0), final)
    start(tmp_path, final, resumed_at=20, validated=True)
    assert values(tmp_path, "validation", "top1") == [(10, 20.0), (20, 25.0)]
    start(tmp_path, validation_row(24, 27.0, kind="final"), resumed_at=20, validated=True)
    assert values(tmp_path, "validation", "top1") == [(10, 20.0), (20, 25.0), (24, 27.0)]


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install it; it comes before any process starts, and only where TensorBoard is wanted."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(make, "BackgroundTracker", None)
    console = ConsoleTracker(epochs=1, steps=20, samples_per_step=8, log_file=tmp_path / "log.txt")
    with pytest.raises(UserError, match=r"tracking.tensorboard=true: not installed; run `uv pip install tensorboard`"):
        check_tensorboard()
    config = TrackingConfig(WandbMode.off, tensorboard=True)
    with pytest.raises(UserError, match="tensorboard"):
        make.make_tracker(config, tmp_path, console, resumed_at=0, settings={})
    without = make.make_tracker(TrackingConfig(WandbMode.off), tmp_path, console, resumed_at=0, settings={})
    without.close(failed=False)
