"""Tests of accumulation_steps=auto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from metaformer import runtime
from metaformer.assembly.accumulation import Fits, prepare, step_fits
from metaformer.assembly.preparation import Preparation
from metaformer.composing import compose_training
from metaformer.errors import UserError
from tests.conftest import QUICK, rows

Run = Callable[..., dict[str, Any]]
SMALL = (*QUICK, "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "workers=0", "epochs=3")
AUTO = "accumulation_steps=auto"


def prepared(tries: Fits | None, *overrides: str) -> Preparation:
    with runtime.start() as ranks:
        return prepare(compose_training([*SMALL, AUTO, *overrides]), ranks, tries)


def with_room_for(images: int) -> Fits:
    """Try real steps of a network that runs out of memory for more images in a forward pass."""

    def limit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > images:
            raise torch.OutOfMemoryError("injected")

    def tries(preparation: Preparation, number: int) -> bool:
        with preparation.state.model.register_forward_pre_hook(limit):
            return step_fits(preparation, number)

    return tries


@pytest.mark.parametrize(("room", "number"), [(8, 1), (7, 2), (3, 4)])
def test_the_smallest_that_fits(room: int, number: int, images: Path, tmp_path: Path) -> None:
    """Real steps on a rank's 8 images are tried in one, two and four parts; the network is then initialised again."""
    options = (f"data.root={images}", f"run_dir={tmp_path}")
    found = prepared(with_room_for(room), *options)
    assert found.config.accumulation == number
    assert found.lines[0] == f"accumulation {number}, the smallest that fits in memory (auto)"
    fresh = prepared(None, *options).state
    for name, value in found.state.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name]), name


def test_nothing_fits(images: Path, tmp_path: Path) -> None:
    """Mixup needs pairs, so 4 steps of 2 images are the most."""
    with pytest.raises(
        UserError, match=r"accumulation_steps=auto: not even 4 steps fit in memory; use a smaller image"
    ):
        prepared(with_room_for(1), f"data.root={images}", f"run_dir={tmp_path}")


def test_a_resume_keeps_the_number(images: Path, tmp_path: Path, run_program: Run) -> None:
    """On a CPU it is 1, which config.yaml records; a run that began with 2 resumes with 2, bit for bit."""
    data = f"data.root={images}"
    run_program("train", data, *SMALL, AUTO, "max_steps=1", f"run_dir={tmp_path / 'new'}")
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["accumulation_steps"] == 1
    assert (
        "accumulation 1, the smallest; nothing is tried on a CPU (auto)" in (tmp_path / "new" / "log.txt").read_text()
    )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_program("train", data, *SMALL, "accumulation_steps=2", "max_steps=4", f"run_dir={whole}")
    run_program("train", data, *SMALL, "accumulation_steps=2", "max_steps=2", f"run_dir={parts}")
    run_program("train", data, *SMALL, AUTO, "max_steps=4", f"run_dir={parts}")
    assert "accumulation 2, as the run began (auto)" in (parts / "log.txt").read_text()
    assert rows(parts) == rows(whole)


def test_other_texts_are_refused() -> None:
    """Only numbers from 1 and auto are accepted."""
    for value in ("many", "0", "-1"):
        with pytest.raises(UserError, match=f"accumulation_steps={value}: must be"):
            compose_training([f"accumulation_steps={value}"])
