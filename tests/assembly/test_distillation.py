"""Tests of runs with a teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from tests.conftest import QUICK, rows

Run = Callable[..., dict[str, Any]]
TIMM = ("model=timm", "model.name=test_resnet", "model.drop_path_rate=null")
OURS = ("model=metaformer", "model.depths=[1,1,1,1]", "model.dims=[8,8,8,8]", "ema=enabled")


@pytest.fixture(scope="module")
def options(images: Path) -> tuple[str, ...]:
    """Return the options that teacher and student share."""
    return (f"data.root={images}", *QUICK, "workers=0", "epochs=1")


@pytest.mark.parametrize(
    ("network", "student"), [(TIMM, "test_resnet"), (OURS, "test_byobnet")], ids=["timm", "metaformer"]
)
def test_resumes_bit_for_bit(
    options: tuple[str, ...], tmp_path: Path, run_program: Run, network: tuple[str, ...], student: str
) -> None:
    """A run with a teacher, which is another run, continues as an uninterrupted one; it differs from one without."""
    teacher = tmp_path / "teacher"
    run_program("train", *options, *network, f"run_dir={teacher}", "max_steps=2")
    own = ("model=timm", f"model.name={student}", "model.drop_path_rate=null")
    command = (*options, *own, f"distill.teacher={teacher}")
    whole, cut, plain = (tmp_path / name for name in ("whole", "cut", "plain"))
    run_program("train", *command, f"run_dir={whole}", "distill.temperature=2")
    run_program("train", *command, f"run_dir={cut}", "distill.temperature=2", "max_steps=2")
    run_program("train", *command, f"run_dir={cut}", "distill.temperature=2")
    assert rows(cut) == rows(whole)
    run_program("train", *command[:-1], f"run_dir={plain}")
    assert rows(plain)[0]["loss"] != rows(whole)[0]["loss"]
    log = (whole / "log.txt").read_text()
    name = "metaformer" if network is OURS else "test_resnet"
    assert f" teacher      {name}, fused blocks off (CPU)\n" in log
    assert " teacher      weight 0.5, temperature 2\n" in log
    with pytest.raises(UserError, match=r"distill\.teacher=.*, this run has None"):
        run_program("train", *command[:-1], f"run_dir={cut}")


def test_refused_teachers(options: tuple[str, ...], tmp_path: Path, run_program: Run) -> None:
    """A teacher of other classes, other colours or an unknown network is one line."""
    teacher = tmp_path / "teacher"
    run_program("train", *options, *TIMM, f"run_dir={teacher}", "max_steps=1")
    command = (*options, *TIMM, f"run_dir={tmp_path / 'student'}", f"distill.teacher={teacher}")
    with pytest.raises(UserError, match=r"^distill\.teacher=\S+: expects images of mean .*; give model\.mean="):
        run_program("train", *command, "model.mean=[0.1,0.2,0.3]")
    with pytest.raises(UserError, match=r"^distill\.teacher=\S+: has 4 outputs, but the student has 5; give a teacher"):
        run_program("train", *command, "num_classes=5", "allow_unused_classes=true")
    with pytest.raises(UserError, match=r"^distill\.teacher=nowhere: "):
        run_program("train", *command[:-1], "distill.teacher=nowhere")
    assert not (tmp_path / "student").exists()
