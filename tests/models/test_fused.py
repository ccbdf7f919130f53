"""Fused blocks compared with the plain path, the choice of stages, and the check on the device."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaformer.models import MetaFormer, fused
from metaformer.models.activations import StarReLU
from metaformer.models.fused import BlockShape, find_fault, fuse, run_fused
from metaformer.models.kernels import operators
from metaformer.models.metaformer import POOLFORMER_PARTS, Architecture, BlockParts, Stage
from metaformer.models.norms import GroupNormWithoutBias, group_norm
from metaformer.models.token_mixers import Pooling
from metaformer.models.variants import VARIANTS
from tests.models.reference_kernels import REFERENCE
from tests.models.test_metaformer import randomise

pytestmark = pytest.mark.usefixtures("reference_kernels")

CPU = torch.device("cpu")
BASELINE_PARTS = BlockParts(GroupNormWithoutBias, StarReLU, layer_scale_init=None, mlp_bias=False)
KINDS = {
    "PoolFormer": POOLFORMER_PARTS,
    "PoolFormerV2": BASELINE_PARTS,
    "mixed": BlockParts(group_norm, StarReLU, layer_scale_init=0.5, mlp_bias=True),
}


def network(size: int = 3, parts: BlockParts = POOLFORMER_PARTS) -> MetaFormer:
    """Return a network of four stages with drop path, whose parameters all affect the output."""

    def pooling(dim: int, side: int) -> Pooling:
        return Pooling(dim, side, size)

    architecture = Architecture((2, 1, 2, 1), (8, 16, 24, 32), [pooling] * 4, drop_path_rate=0.3, parts=parts)
    model = MetaFormer(architecture, num_classes=5)
    randomise(model)
    return model


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return logits and all gradients, with a fixed seed for drop path."""
    torch.manual_seed(2)
    model.zero_grad()
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    logits.square().sum().backward()
    assert leaf.grad is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "images": leaf.grad, **gradients}


@pytest.mark.parametrize(
    ("size", "kind"), [*((size, "PoolFormer") for size in (3, 5, 7, 9)), (3, "PoolFormerV2"), (5, "mixed")]
)
@pytest.mark.parametrize("training", [True, False])
def test_fused_network_is_the_plain_one(size: int, kind: str, training: bool) -> None:
    """In float64, logits and the gradients of images and parameters are equal to 12 digits.

    norm1's bias cancels out. Its gradient is exactly zero, while the plain path returns rounding errors.
    """
    model = network(size, KINDS[kind]).double().train(training)
    images = torch.randn(6, 3, 52, 70, dtype=torch.float64)
    expected = outcome(model, images)
    assert fuse(model) == 4
    found = outcome(model, images)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("norm1.bias"):
            assert not found[name].any()
            assert value.abs().max() < 1e-10
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12 * float(value.abs().max()))


def test_drop_path_and_layer_scale_of_zero() -> None:
    """A layer scale of zero still gets its gradient, and no gradient divides by it."""
    model = network().double()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.zeros_(parameter)
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    expected = outcome(model, images)
    fuse(model)
    found = outcome(model, images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    assert found["stages.0.blocks.0.layer_scale2.scale"].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the products have its type and the stream is float32; errors are similar to the plain path's.

    The layer scale is 1e-6 as in the paper; its product with a weight underflows in float16.
    """
    model = network().eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.constant_(parameter, 1e-6)
    images = torch.randn(6, 3, 80, 80)
    exact = outcome(model, images)
    with torch.autocast("cpu", dtype):
        plain = outcome(model, images)
    fuse(model)
    with torch.autocast("cpu", dtype):
        found = outcome(model, images)
    for name, value in exact.items():
        if not name.endswith("norm1.bias"):
            error, plain_error = ((other[name].float() - value).norm() for other in (found, plain))
            assert error < 2 * plain_error + 1e-3 * value.norm(), name
    blocks, x = model.get_submodule("stages.0.blocks"), torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype):
        assert run_fused(blocks, x.to(dtype)).dtype == torch.float32  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stages_before_a_convolution_return_its_type(dtype: torch.dtype) -> None:
    """They save a pass over memory, and no bit of logits and gradients changes. PoolFormerV2 has a norm in between."""
    model, images = network(), torch.randn(4, 3, 48, 80)
    fuse(model)
    with torch.autocast("cpu", dtype):
        found = outcome(model, images)
        sizes = [x.dtype for x in accumulate(model.stages, lambda x, stage: stage(x), initial=model.stem(images))]
    assert sizes == [*[dtype] * 4, torch.float32]
    for stage in fused.fusable_stages(model):
        stage.run_blocks = run_fused
    with torch.autocast("cpu", dtype):
        expected = outcome(model, images)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    second = MetaFormer(replace(VARIANTS["poolformerv2_s12"], depths=(1,) * 4, dims=(8,) * 4), num_classes=2)
    fuse(second)
    with torch.autocast("cpu", dtype):
        assert second.stages[0](second.stem(images)).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: str) -> None:
    """torch.compile traces the network without a graph break, and the compiled gradients equal the plain ones."""
    model = network(parts=KINDS[kind]).double().eval()
    images = torch.randn(6, 3, 52, 70, dtype=torch.float64)
    expected = outcome(model, images)
    fuse(model)
    model.compile(backend="aot_eager", fullgraph=True)
    for name, value in outcome(model, images).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switch", [fuse, lambda _: None], ids=["fused", "plain"])
def test_gradients_have_the_strides_of_weights(kind: str, switch: Callable[[MetaFormer], object]) -> None:
    """A channels_last weight and its gradient have equal strides; otherwise distributed training warns and copies."""
    model = network(parts=KINDS[kind]).to(memory_format=torch.channels_last)
    switch(model)
    outcome(model, torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


def test_fusable_networks() -> None:
    """PoolFormers and pooling ablations are fusable in all stages, hybrids in pooling stages, others in none.

    PoolFormerV2 is fusable in the first two stages, which do not scale the residual.
    """
    fused_stages = {}
    for name in VARIANTS:
        small = replace(VARIANTS[name], depths=(1, 1, 1, 1), dims=(32, 32, 32, 32))
        model = MetaFormer(small, num_classes=2, image_size=32)
        stages = [stage for stage in model.stages if isinstance(stage, Stage)]
        fused_stages[name] = sum(all(fused.is_fusable(block) for block in stage.blocks) for stage in stages)
    whole = [name for name in VARIANTS if name.startswith("poolformer_") or "_pool" in name]
    second = [name for name in VARIANTS if name.startswith("poolformerv2_")]
    assert {name for name, count in fused_stages.items() if count} == {
        *whole, *second, "metaformer_s12_pppf", "metaformer_s12_ppff",
    }  # fmt: skip
    assert [fused_stages[name] for name in second] == [2] * 5
    assert all(fused_stages[name] == 4 for name in whole)
    assert (fused_stages["metaformer_s12_pppf"], fused_stages["metaformer_s12_ppff"]) == (3, 2)


def test_state_dict_stays_the_same() -> None:
    """Fusing keeps the keys of the state dict, which still loads strictly into the plain network."""
    plain, changed = network(), network()
    fuse(changed)
    assert list(changed.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(changed.state_dict(), strict=True)


def shapes_checked(monkeypatch: pytest.MonkeyPatch, name: str, image_size: int) -> list[tuple[int, ...]]:
    """Return the shapes that a successful check runs."""
    shapes: list[BlockShape] = []

    def record(device: torch.device, dtype: torch.dtype | None, shape: BlockShape) -> float:
        shapes.append(shape)
        assert shape.parts == expected_parts
        return 0.0

    monkeypatch.setattr(fused, "_relative_difference", record)
    second = name.startswith("poolformerv2")
    expected_parts = BASELINE_PARTS if second else BlockParts(layer_scale_init=0.5)
    small = replace(VARIANTS[name], depths=(1, 1, 1, 1))
    model = MetaFormer(small, num_classes=2, image_size=image_size)
    assert find_fault(model, image_size, torch.device("cuda"), torch.bfloat16) is None
    return [shape[:4] for shape in shapes]  # without the parts


def test_checked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check uses each fused stage's width, side and window in training."""
    for side, image_size in ((56, 224), (8, 32)):
        sides = (side, side // 2, side // 4, side // 8)
        for name, widths in (("poolformer_s12", (64, 128, 320, 512)), ("poolformer_m36", (96, 192, 384, 768))):
            expected = [(width, side, 3, 16) for width, side in zip(widths, sides, strict=True)]
            assert shapes_checked(monkeypatch, name, image_size) == expected
    assert shapes_checked(monkeypatch, "metaformer_s12_pppf", 224) == [
        (64, 56, 3, 16),
        (128, 28, 3, 16),
        (320, 14, 3, 16),
    ]
    assert shapes_checked(monkeypatch, "metaformer_s12_pool7", 224)[3] == (512, 7, 7, 16)
    assert shapes_checked(monkeypatch, "poolformerv2_s12", 224) == [(64, 56, 3, 16), (128, 28, 3, 16)]
    assert shapes_checked(monkeypatch, "metaformer_s12_identity", 224) == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype | None) -> None:
    """A wrong value, a wrong gradient or an exception gives one line; correct kernels give None."""
    model = network(parts=KINDS[kind])
    assert find_fault(model, 64, CPU, dtype) is None
    kernels = REFERENCE

    class CompilerError(Exception):
        """An error that, like Triton's own, is not a RuntimeError."""

    def fail(*_: object) -> Tensor:
        raise CompilerError("no such instruction\nand more")

    faults: dict[str, Any] = {
        "normalize": lambda *a: kernels.normalize(*a) * 1.1,
        "mix_backward": lambda *a: kernels.mix_backward(*a) * 1.2,
        "finish_sums": lambda *a: (kernels.finish_sums(*a)[0], kernels.finish_sums(*a)[1] * 1.2),
    }
    if kind == "PoolFormer":
        faults["gelu_backward"] = lambda *a: (
            *kernels.gelu_backward(*a)[:2],
            torch.zeros(len(a[0]), 1, a[0].shape[3]),
            torch.zeros(len(a[0]), 1, 2),
        )
        faults["gelu"] = fail
    else:
        faults["squared_relu_backward"] = lambda *a: tuple(1.2 * r for r in kernels.squared_relu_backward(*a))
        faults["squared_relu"] = fail
    for name, wrong in faults.items():
        broken = kernels._replace(**{name: wrong})
        monkeypatch.setattr(operators, "triton_kernels", lambda broken=broken: broken)
        fault = find_fault(model, 64, CPU, dtype)
        assert fault is not None, name
        assert fault.startswith("they ")
        assert "\n" not in fault
