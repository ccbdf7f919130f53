"""Tests of dry runs: they predict a run from real steps, and write nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaformer import runtime
from metaformer.assembly.dry_run import STEPS, dry_run
from metaformer.assembly.preparation import prepare_training
from metaformer.composing import compose_training
from metaformer.errors import UserError
from tests.conftest import QUICK, TRAIN_IMAGES

Run = Callable[..., dict[str, Any]]
SMALL = (*QUICK, "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "workers=0", "epochs=3")


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_it_predicts_the_run_and_writes_nothing(
    images: Path, tmp_path: Path, run_program: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time, hours and checkpoints are those of the planned run; neither the run folder nor any other file appears."""
    monkeypatch.chdir(tmp_path)
    run_dir, data = tmp_path / "runs" / "run", f"data.root={images}"
    result = run_program("train", data, *SMALL, "dry_run=true", "checkpoint.keep_every_epochs=2", f"run_dir={run_dir}")
    assert files(tmp_path) == set()
    assert result["steps"] == 3 * TRAIN_IMAGES // 8
    assert result["seconds"] == pytest.approx(3 * TRAIN_IMAGES / result["images_per_second"])
    assert result["rank_hours"] == pytest.approx(result["seconds"] / 3600)
    assert result["checkpoints"] == 2 + 2 + 1
    assert result["largest_batch_per_rank"] is None, "a CPU's memory is not searched"

    run_program("train", data, *SMALL, "max_steps=1", f"run_dir={run_dir}")
    saved = run_dir / "checkpoints" / "last"
    written = sum(file.stat().st_size for file in saved.iterdir())
    assert result["checkpoint_bytes"] == pytest.approx(written, rel=0.1)
    before = {file: file.stat().st_mtime_ns for file in files(tmp_path)}
    assert run_program("train", data, *SMALL, "max_steps=5", "dry_run=true", f"run_dir={run_dir}")["steps"] == 5
    assert {file: file.stat().st_mtime_ns for file in files(tmp_path)} == before, "a run folder stays as it is"


def run_with_room_for(images_per_pass: int, *overrides: str) -> dict[str, Any]:
    """Dry-run with a network that runs out of memory for more images than these in a forward pass."""
    with runtime.start() as ranks:
        prepared = prepare_training(compose_training([*SMALL, *overrides]), ranks)

        def limit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training and len(inputs[0]) > images_per_pass:
                raise torch.OutOfMemoryError("injected")

        prepared.state.model.register_forward_pre_hook(limit)
        return dry_run(prepared, searches=True)


def test_the_largest_batch(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The search finds it above and below the configured one; if a step does not fit, the error says what does."""
    data = (f"data.root={images}", f"run_dir={tmp_path / 'run'}")
    assert run_with_room_for(20, *data)["largest_batch_per_rank"] == 20
    assert "20 images per rank and forward pass fit: global_batch_size=20" in capsys.readouterr().out
    assert run_with_room_for(10**6, *data)["largest_batch_per_rank"] == 32, "of 48 images, by doubling from 8"
    with pytest.raises(UserError, match=r"global_batch_size=8: 8 images per .* 4 do; use accumulation_steps=2$"):
        run_with_room_for(5, *data)
    with pytest.raises(UserError, match=r"0 do; use a smaller image_size or network$"):
        run_with_room_for(1, *data)
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_watched(images: Path, tmp_path: Path) -> None:
    """All steps of a dry run, and of its search for the largest batch, are taken while the watchdog is paused."""
    paused = [False]

    @contextmanager
    def pause() -> Iterator[None]:
        before, paused[0] = paused[0], True
        yield
        paused[0] = before

    seen = []
    with runtime.start(pause_watchdog=pause) as ranks:
        prepared = prepare_training(compose_training([*SMALL, f"data.root={images}", f"run_dir={tmp_path}"]), ranks)
        prepared.state.model.register_forward_pre_hook(lambda *_: seen.append(paused[0]))
        dry_run(prepared, searches=True)
    assert len(seen) > STEPS
    assert all(seen)
