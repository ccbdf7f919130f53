"""experiment=finetune through train.py: frozen parts, new heads, exact resumes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metaformer.errors import UserError
from tests.conftest import QUICK, launch, rows

Run = Callable[..., dict[str, Any]]
FINETUNE = ("experiment=finetune", "global_batch_size=8", "eval_batch_size=32", "tracking=local", "precision=fp32",
            "workers=0", "log_every_steps=1", "schedule.warmup_steps=1", "report.enabled=false")  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of timm's test_resnet, which has BatchNorms, with four classes."""
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    network = ("model=timm", "model.name=test_resnet")
    done = launch("train", *QUICK, *network, f"data.root={images}", f"run_dir={run_dir}", "max_steps=2")
    assert done.code == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def three(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three of the classes."""
    root = tmp_path_factory.mktemp("three")
    for split in ("train", "val"):
        (root / split).mkdir()
        for number in range(3):
            (root / split / f"class_{number}").symlink_to(images / split / f"class_{number}")
    return root


def weights(run_dir: Path, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / "last" / f"{file}.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_parts_stay_and_a_resume_is_exact(pretrained: Path, three: Path, tmp_path: Path, ranks: int) -> None:
    """The run brings its network; stem and first stage keep weights and running statistics, on two ranks too.

    Stopped after a step and resumed, the run ends with the same weights and average.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = (*FINETUNE, f"data.root={three}", f"init_weights={pretrained}", "model.freeze=stages:1")
    for run_dir, steps in ((whole, 3), (parts, 1), (parts, 3)):
        done = launch("train", *common, f"run_dir={run_dir}", f"max_steps={steps}", ranks=ranks)
        assert done.code == 0, done.stderr
    log = (whole / "log.txt").read_text()
    assert "model        test_resnet, " in log
    assert " head         4 -> 3 classes, new" in log
    assert " frozen       stages:1: " in log
    before, after = weights(pretrained), weights(whole)
    frozen = {key for key in after if key.startswith(("conv1", "bn1", "layer1"))}
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not torch.equal(before["layer2.0.bn1.running_mean"], after["layer2.0.bn1.running_mean"])
    assert not torch.equal(before["layer4.0.conv1.weight"], after["layer4.0.conv1.weight"])
    assert rows(whole) == rows(parts)
    for file in ("model", "ema"):
        assert all(torch.equal(tensor, weights(parts, file)[key]) for key, tensor in weights(whole, file).items())


def test_changes_that_a_resume_refuses(pretrained: Path, three: Path, tmp_path: Path, run_program: Run) -> None:
    """Another frozen part, or layer decay turned off, in one line; so is freezing without weights to keep."""
    run_dir = tmp_path / "run"
    common = ("train", *FINETUNE, f"data.root={three}", f"run_dir={run_dir}")
    start = f"init_weights={pretrained}"
    run_program(*common, start, "model.freeze=all_but_head", "max_steps=1")
    changed = {key for key, tensor in weights(run_dir).items() if key in (before := weights(pretrained))
               and not torch.equal(tensor, before[key]) if key.split(".")[0] != "fc"}  # fmt: skip
    assert changed == set()
    with pytest.raises(UserError, match=r"cannot resume: it was trained with model\.freeze=all_but_head"):
        run_program(*common, start, "max_steps=2")
    with pytest.raises(UserError, match=r"cannot resume: it was trained with layer-wise learning rates=True"):
        run_program(*common, start, "max_steps=2", "model.freeze=all_but_head", "optimizer.layer_decay=null")
    shutil.rmtree(run_dir)
    with pytest.raises(UserError, match=r"^model\.freeze=stem: would keep random weights; give init_weights too$"):
        run_program(*common, "model.freeze=stem")
    with pytest.raises(UserError, match=r"^model\.freeze=stages=2: must be stem, all_but_head or stages:N"):
        run_program(*common, start, "model.freeze='stages=2'")
