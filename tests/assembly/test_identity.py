"""Tests of what a run keeps when it resumes: class balance and repeated augmentation."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.assembly import preparation
from metaformer.assembly.identity import run_identity
from metaformer.errors import UserError
from tests.conftest import QUICK, VAL_IMAGES, rows

Run = Callable[..., dict[str, Any]]
SMALL = (*QUICK, "workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "epochs=1")


@pytest.mark.parametrize(
    ("given", "other", "refused"),
    [
        ("data.balance=uniform", "data.balance=none", r"trained with data\.balance=uniform, this run has none;"),
        ("augmentation.repeats=3", "augmentation.repeats=1", r"with augmentation\.repeats=3, this run has 1;"),
    ],
)
def test_resumes_in_the_sequence(
    images: Path, tmp_path: Path, run_program: Run, given: str, other: str, refused: str
) -> None:
    """A run interrupted in an epoch continues as an uninterrupted one; another sequence is refused by name."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for file in sorted((root / "train" / "class_0").iterdir())[4:]:
        file.unlink()
    command = (f"data.root={root}", *SMALL)
    whole, cut = (f"run_dir={tmp_path / name}" for name in ("whole", "cut"))
    run_program("train", *command, given, whole)
    run_program("train", *command, given, cut, "max_steps=2")
    with pytest.raises(UserError, match=refused):
        run_program("train", *command, other, cut)
    run_program("train", *command, given, cut)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    run_program("train", *command, other, f"run_dir={tmp_path / 'other'}")
    assert rows(tmp_path / "other")[-1]["loss"] != rows(tmp_path / "whole")[-1]["loss"]


def test_checkpoints_of_earlier_versions_used_every_image_once(images: Path, tmp_path: Path, run_program: Run) -> None:
    """A checkpoint that does not record the balance and the like resumes without, and is refused with."""
    command = (f"data.root={images}", *SMALL, f"run_dir={tmp_path / 'run'}")

    def earlier_identity(*parts: Any) -> dict[str, Any]:
        identity = run_identity(*parts)
        new = {"data.balance", "augmentation.repeats", "distill.teacher", "model.freeze", "layer-wise learning rates"}
        new.add("loader.decode")
        return {name: value for name, value in identity.items() if name not in new}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "run_identity", earlier_identity)
        run_program("train", *command, "max_steps=2")
    with pytest.raises(UserError, match=r"trained with data\.balance=none, this run has sqrt;"):
        run_program("train", *command, "data.balance=sqrt")
    with pytest.raises(UserError, match=r"trained with augmentation\.repeats=1, this run has 2;"):
        run_program("train", *command, "augmentation.repeats=2")
    with pytest.raises(UserError, match=r"trained with loader\.decode=exact, this run has scaled;"):
        run_program("train", *command, "loader.decode=scaled")
    with pytest.raises(UserError, match=r"trained with layer-wise learning rates=False, this run has True;"):
        run_program("train", *command, "optimizer.layer_decay=0.9")
    weights = f"init_weights={tmp_path / 'run'}"
    with pytest.raises(UserError, match=r"trained with model\.freeze=None, this run has stem;"):
        run_program("train", *command, weights, "model.freeze=stem")
    with pytest.raises(UserError, match=r"trained with distill\.teacher=None, this run has test_resnet "):
        run_program("train", *command, f"distill.teacher={tmp_path / 'run'}")
    assert run_program("train", *command, "max_steps=3")["images"] == VAL_IMAGES


def test_validation_refuses_a_balance(run_program: Run) -> None:
    """validate.py does not ignore data.balance, nor loader.decode."""
    with pytest.raises(UserError, match=r"^data\.balance=sqrt: train\.py only"):
        run_program("validate", "checkpoint=none", "data.balance=sqrt")
    with pytest.raises(UserError, match=r"^loader\.decode=scaled: train\.py only"):
        run_program("validate", "checkpoint=none", "loader.decode=scaled")


@pytest.mark.parametrize("loader", ["pil", "dali"])
def test_loaders_that_decode_exactly_refuse_scaled_decoding(images: Path, run_program: Run, loader: str) -> None:
    """loader.decode=scaled is not ignored by a loader that cannot do it."""
    with pytest.raises(UserError, match=rf"^loader\.decode=scaled: loader={loader} decodes exactly; use loader=torch"):
        run_program("train", f"data.root={images}", *SMALL, f"loader={loader}", "loader.decode=scaled")
