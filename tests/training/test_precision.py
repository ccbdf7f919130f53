"""Test number formats: casts, loss scaling, skipped steps and errors."""

import copy
import math

import pytest
import torch
from torch import nn

from metaformer.errors import UserError
from metaformer.training.config import PrecisionConfig, PrecisionName
from metaformer.training.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_matrix_products_have_the_format(name: str, dtype: torch.dtype) -> None:
    """Matrix products under autocast have the format; parameters, gradients and results outside are float32."""
    precision, layer, images = Precision(PrecisionConfig(PrecisionName[name]), CPU), nn.Linear(3, 2), torch.randn(4, 3)
    with precision.autocast():
        inside = layer(images)
    assert inside.dtype == dtype
    assert layer(images).dtype == torch.float32
    inside.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_fp32_changes_nothing() -> None:
    """With fp32 the result is bit-identical to that without autocast; with bf16 it is not."""
    layer, images = nn.Linear(64, 8), torch.randn(4, 64)
    for name in (PrecisionName.fp32, PrecisionName.bf16):
        with Precision(PrecisionConfig(name), CPU).autocast():
            inside = layer(images).float()
        assert torch.equal(inside, layer(images)) == (name is PrecisionName.fp32)


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_only_fp16_is_scaled(name: str) -> None:
    """For other formats, the scaler does not scale losses, has no state, and steps the optimizer."""
    scaler = Precision(PrecisionConfig(PrecisionName[name]), CPU).scaler
    weight = nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(2 * weight).backward()
    assert weight.grad == 2
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight == 1
    assert scaler.get_scale() == 1
    assert scaler.state_dict() == {}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_step_on_non_finite_gradients_is_skipped(fused: bool, wrong: float) -> None:
    """After a NaN or infinity in a gradient, weights and optimizer state are unchanged, and the skip is reported."""
    scaler = Precision(PrecisionConfig(PrecisionName.bf16), CPU).scaler
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=fused)

    def step(last: float) -> float:
        scaler.scale(weights[0].sum()).backward()
        weights[1].grad = torch.tensor([1.0, last])
        scaler.step(optimizer)
        skipped = float(scaler.skipped(optimizer))
        scaler.update()
        optimizer.zero_grad()
        return skipped

    assert step(1.0) == 0
    before = copy.deepcopy((weights, optimizer.state_dict()["state"]))
    assert step(wrong) == 1
    torch.testing.assert_close((weights, optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert step(1.0) == 0
    assert not torch.equal(weights[0], before[0][0])


def test_fp16_needs_a_gpu() -> None:
    """fp16 on a CPU is refused, and the error suggests alternatives."""
    with pytest.raises(UserError, match=r"precision=fp16: needs a GPU; use precision=fp32 or precision=bf16"):
        Precision(PrecisionConfig(PrecisionName.fp16), CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp16_is_scaled_on_a_gpu() -> None:
    """On a GPU, fp16 scales losses so that small gradients do not underflow."""
    precision = Precision(PrecisionConfig(PrecisionName.fp16), torch.device("cuda"))
    assert precision.scaler.is_enabled()
    assert precision.scaler.scale(torch.ones((), device="cuda")) > 1


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_setting(tf32: bool) -> None:
    """The setting of TF32, off by default, applies to matrix products and convolutions, whatever was set before."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = False
        torch.backends.cudnn.allow_tf32 = not tf32
        Precision(PrecisionConfig(PrecisionName.fp32, tf32=tf32), CPU)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.deterministic  # so that results are bit-reproducible
        assert not PrecisionConfig().tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags[:2]
        torch.backends.cudnn.deterministic = flags[2]
