"""Run folders on other file systems, copied, and damaged: whole runs, with a small network."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, rows

Run = Callable[..., dict[str, Any]]
SMALL = (*QUICK, "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "workers=0")


def test_without_links_and_copied(
    images: Path, tmp_path: Path, run_program: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, validated and resumed where no links can be made; then in a copy whose links have become folders."""
    command = (f"data.root={images}", *SMALL, "epochs=1", "checkpoint.every_steps=1")
    refused = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", lambda *arguments, **options: (_ for _ in ()).throw(refused))
        for steps in (2, 4):
            run_program("train", *command, f"run_dir={tmp_path / 'run'}", f"max_steps={steps}")
        checkpoints = tmp_path / "run" / "checkpoints"
        assert (checkpoints / "last").read_text() == "step-00000004\n"
        options = (f"data.root={images}", *(each for each in SMALL if each.startswith(("model", "workers"))))
        for given in (tmp_path / "run", checkpoints / "last", checkpoints / "last" / "model.safetensors"):
            result = run_program("validate", *options, "precision=fp32", "image_size=32", f"checkpoint={given}")
            assert result["checkpoint"] == str(checkpoints / "step-00000004" / "model.safetensors")

    copy = tmp_path / "copy" / "checkpoints"
    shutil.copytree(tmp_path / "run", copy.parent)
    (copy / "last").unlink()
    shutil.copytree(copy / "step-00000004", copy / "last")
    run_program("train", *command, f"run_dir={copy.parent}")
    assert [row["step"] for row in rows(copy.parent)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in copy.iterdir()) == ["best", "epoch-001", "last", "step-00000005"]
    assert (copy / "last").readlink() == Path("epoch-001")
