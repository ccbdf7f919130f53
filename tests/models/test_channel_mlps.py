"""Products over channels, computed as matrix products or as convolutions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from metaformer.models import channel_mlps, create_model
from metaformer.models.channel_mlps import LinearLayer, Mlp, PositionwiseLayer, conv_layer, has_slow_matrix_products
from metaformer.models.families import COMPOSITIONS
from metaformer.models.metaformer import MetaFormer

# Networks whose MLPs are convolutions, linear layers, and both; and their products, of which attention has two.
PRODUCTS = {"poolformer_s12": 4 * 2, "poolformerv2_s12": 4 * 2, "caformer_s18": 4 * 2 + 2 * 2}


def small(name: str) -> MetaFormer:
    torch.manual_seed(0)
    architecture = replace(COMPOSITIONS[name], depths=(1, 1, 1, 1), dims=(32, 32, 64, 64))
    model = create_model(architecture, 5, image_size=64).to(memory_format=torch.channels_last)
    for parameter in model.parameters():  # layer scale at 1e-5 would hide the MLPs
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return model


def run(model: MetaFormer, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
    """Return the logits and all gradients of a step, and the number of convolutions in its forward pass."""
    torch.manual_seed(1)
    images = torch.randn(16, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    model.zero_grad()
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, autocast:
        logits = model(images)
    logits.float().square().mean().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name  # otherwise distributed training warns and copies
        gradients[name] = parameter.grad
    return {"logits": logits.detach(), **gradients}, sum(e.name == "aten::convolution" for e in profiler.events())


@pytest.mark.parametrize("name", PRODUCTS)
def test_convolutions_compute_what_matrix_products_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, the products of MLPs and attention become convolutions; under autocast they do not."""
    model = small(name)
    monkeypatch.setattr(channel_mlps, "CONVOLVE_IN_FLOAT32", False)
    expected, before = run(model)
    _, under_autocast = run(model, torch.bfloat16)
    monkeypatch.setattr(channel_mlps, "CONVOLVE_IN_FLOAT32", True)
    found, after = run(model)
    largest = max(float(value.abs().max()) for value in expected.values())  # some gradients are zero but for rounding
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-6 * largest)
    assert after == before + PRODUCTS[name]
    assert run(model, torch.bfloat16)[1] == under_autocast == before


@pytest.mark.parametrize("convolve", [False, True])
@pytest.mark.parametrize("layer", [conv_layer, LinearLayer])
def test_both_compile_to_one_graph(layer: PositionwiseLayer, convolve: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_mlps, "CONVOLVE_IN_FLOAT32", convolve)
    mlp = Mlp(8, 32, nn.GELU, layer)
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("vendor", "slow"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
def test_only_other_makers_than_intel_convolve(vendor: str | None, slow: bool, tmp_path: Path) -> None:
    """MKL is slow on processors of other makers; ARM's, for which the file names no maker, have no MKL."""
    processors = tmp_path / "cpuinfo"
    assert not has_slow_matrix_products(processors)
    lines = ["processor\t: 0", *([f"vendor_id\t: {vendor}"] if vendor else []), "flags\t\t: fpu sse avx"]
    processors.write_text("".join(f"{line}\n" for line in lines))
    assert has_slow_matrix_products(processors) == (slow and torch.backends.mkl.is_available())
