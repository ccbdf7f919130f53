"""Tests of the training losses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from metaformer.composing import compose_training
from metaformer.errors import UserError
from metaformer.interfaces import Batch
from metaformer.training.config import LossConfig, LossName
from metaformer.training.losses import make_loss
from tests.conftest import CLASSES, QUICK, rows

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
TARGETS = torch.tensor([[0.7, 0.25, 0.05], [0.1, 0.1, 0.8]])
BATCH = Batch(torch.zeros(2, 3, 1, 1), TARGETS)


def binary(targets: torch.Tensor) -> torch.Tensor:
    """Return the binary cross entropies [B, C] of LOGITS from their definition."""
    p = LOGITS.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log())


def test_values() -> None:
    """Each loss equals its definition; the threshold makes targets 0 or 1; the sum is over classes only."""
    loss = make_loss(LossConfig())(LOGITS, BATCH)
    assert loss == pytest.approx(float(-(TARGETS * LOGITS.log_softmax(1)).sum(1).mean()))
    soft = make_loss(LossConfig(LossName.bce))(LOGITS, BATCH)
    assert soft == pytest.approx(float(binary(TARGETS).mean()))
    hard_targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    hard = make_loss(LossConfig(LossName.bce, target_threshold=0.2, sum_classes=True))(LOGITS, BATCH)
    assert hard == pytest.approx(float(binary(hard_targets).sum(1).mean()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["loss.target_threshold=0.2"],
            r"^loss\.target_threshold=0\.2: not used by loss=cross_entropy; give loss=bce$",
        ),
        (["loss.sum_classes=true"], r"^loss\.sum_classes=True: not used by loss=cross_entropy; give loss=bce$"),
        (["loss=bce", "loss.target_threshold=1"], r"^loss\.target_threshold=1\.0: must be in \[0, 1\)"),
        (["loss=bec"], r"^loss=bec: unknown; did you mean bce\?$"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    """Options that the loss does not use, values out of range and unknown names are refused."""
    with pytest.raises(UserError, match=message):
        compose_training(overrides)


def test_training_uses_the_loss(images: Path, tmp_path: Path, run_program: Callable[..., dict[str, Any]]) -> None:
    """At zero logits, the logged loss of the first step is log 2 with loss=bce; validation reports cross entropy."""
    small = ("workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "epochs=1")
    command = (f"data.root={images}", *QUICK, *small, "optimizer.lr=0", "schedule.warmup_lr=0", "schedule.min_lr=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", lambda images, weight, bias: (images @ weight.T + bias) * 0)
        result = run_program(
            "train", *command, "loss=bce", "loss.target_threshold=0.2", "max_steps=1", f"run_dir={tmp_path}"
        )
    assert rows(tmp_path)[0]["loss"] == pytest.approx(math.log(2))
    assert result["loss"] == pytest.approx(math.log(CLASSES))
