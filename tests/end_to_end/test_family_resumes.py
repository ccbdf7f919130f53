"""Tests that every network of the second paper trains with its recipe, and resumes bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.data.prepare.sample import build_sample
from metaformer.models.families import BASELINES
from tests.conftest import QUICK, rows
from tests.end_to_end.test_training import assert_same_checkpoint

SMALLEST = ("identityformer_s12", "randformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the sample data's images, of all its classes: 50 for training and 20 for validation."""
    folder = tmp_path_factory.mktemp("digits")
    whole, part = folder / "sample", folder / "part"
    build_sample(whole)
    for split, count in (("train", 5), ("val", 2)):
        for digit in (whole / split).iterdir():
            (part / split / digit.name).mkdir(parents=True)
            for file in sorted(digit.iterdir())[:count]:
                (part / split / digit.name / file.name).symlink_to(file)
    return part


@pytest.mark.parametrize(
    "name", [name if name in SMALLEST else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES]
)
def test_two_steps_resume_bit_for_bit(
    digits: Path, tmp_path: Path, run_program: Callable[..., dict[str, Any]], name: str
) -> None:
    """Two steps of the recipe, on end or resumed after the first, give the same losses, weights and optimizer state."""
    common = ("train", f"experiment=baselines/{name}", f"data.root={digits}", *QUICK, "workers=0")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run_program(*common, f"run_dir={whole}", "max_steps=2")
    assert (result["model"], result["step"], result["images"]) == (name, 2, 20)
    assert run_program(*common, f"run_dir={stopped}", "max_steps=1")["step"] == 1
    assert run_program(*common, f"run_dir={stopped}", "max_steps=2")["step"] == 2
    assert [row["step"] for row in rows(stopped)] == [1, 2]
    assert rows(stopped) == rows(whole)
    assert_same_checkpoint(stopped / "checkpoints" / "last", whole / "checkpoints" / "last")
    for folder in (whole, stopped):
        shutil.rmtree(folder)  # gigabytes, which pytest would keep
