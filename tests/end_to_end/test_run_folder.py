"""Tests of whole runs in run folders without symbolic links, in copies, and with a removed lock file."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaformer.errors import UserError
from metaformer.training.checkpoint import CheckpointFolder
from metaformer.training.state import Snapshot
from tests.conftest import QUICK, rows

Run = Callable[..., dict[str, Any]]
SMALL = (*QUICK, "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "workers=0")


def test_without_links_and_copied(
    images: Path, tmp_path: Path, run_program: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, validation and resume work without symbolic links, and in a copy whose links have become folders."""
    command = (f"data.root={images}", *SMALL, "epochs=1", "checkpoint.every_steps=1")
    refused = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", lambda *arguments, **options: (_ for _ in ()).throw(refused))
        for steps in (2, 4):
            run_program("train", *command, f"run_dir={tmp_path / 'run'}", f"max_steps={steps}")
        checkpoints = tmp_path / "run" / "checkpoints"
        assert (checkpoints / "last").read_text() == "step-00000004\n"
        options = (f"data.root={images}", *(each for each in SMALL if each.startswith(("model", "workers"))))
        for source in (tmp_path / "run", checkpoints / "last", checkpoints / "last" / "model.safetensors"):
            result = run_program("validate", *options, "precision=fp32", "image_size=32", f"checkpoint={source}")
            assert result["checkpoint"] == str(checkpoints / "step-00000004" / "model.safetensors")

    copy = tmp_path / "copy" / "checkpoints"
    shutil.copytree(tmp_path / "run", copy.parent)
    (copy / "last").unlink()
    shutil.copytree(copy / "step-00000004", copy / "last")
    run_program("train", *command, f"run_dir={copy.parent}")
    assert [row["step"] for row in rows(copy.parent)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in copy.iterdir()) == ["best", "epoch-001", "last", "step-00000005"]
    assert (copy / "last").readlink() == Path("epoch-001")


def test_the_lock_file_is_removed(
    images: Path, tmp_path: Path, run_program: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removed lock file is restored and logged; if it was replaced, training ends without saving."""
    run_dir = tmp_path / "run"
    lock, save = run_dir / "lock", CheckpointFolder.save

    def remove_after(self: CheckpointFolder, snapshot: Snapshot, name: str, is_best: bool) -> Path:
        saved = save(self, snapshot, name, is_best)
        lock.unlink()
        if name == "step-00000003":
            lock.touch()
        return saved

    monkeypatch.setattr(CheckpointFolder, "save", remove_after)
    options = ("epochs=1", "checkpoint.every_steps=1", "checkpoint.background=false")
    with pytest.raises(UserError, match=rf"^{lock}: was replaced during the run: another run has started"):
        run_program("train", f"data.root={images}", *SMALL, *options, f"run_dir={run_dir}")
    assert (run_dir / "log.txt").read_text().count(f"{lock} was removed during the run; it has been locked again") == 2
    assert (run_dir / "checkpoints" / "last").readlink() == Path("step-00000003")


def test_tensorboard_has_each_row_of_a_resumed_run_once(images: Path, tmp_path: Path, run_program: Run) -> None:
    """A run that stops at step 3 and resumes from step 2 has the curves of metrics.jsonl."""
    options = ("epochs=1", "checkpoint.every_steps=2", "tracking=tensorboard")
    command = (f"data.root={images}", *SMALL, *options, f"run_dir={tmp_path}")
    run_program("train", *command, "max_steps=3")
    run_program("train", *command, f"resume={tmp_path}/checkpoints/step-00000002")
    for kind, name in (("train", "loss"), ("validation", "top1")):
        curve = EventAccumulator(str(tmp_path / "tensorboard" / kind)).Reload().Scalars(name)
        expected = [(row["step"], pytest.approx(row[name])) for row in rows(tmp_path, kind)]
        assert [(point.step, point.value) for point in curve] == expected
