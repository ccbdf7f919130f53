"""Fused blocks compared with the plain path, the choice of stages, and the check on the device."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaformer.models import MetaFormer, create_model, fused
from metaformer.models.activations import StarReLU
from metaformer.models.channel_mlps import LinearLayer
from metaformer.models.families import COMPOSITIONS
from metaformer.models.fused import BlockShape, find_fault, fuse, run_fused
from metaformer.models.kernels import operators
from metaformer.models.metaformer import POOLFORMER_PARTS, Architecture, BlockParts
from metaformer.models.norms import ChannelLayerNorm, GroupNormWithoutBias, group_norm
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
SCALED_PARTS = replace(BASELINE_PARTS, residual_scale=True)
# With all mixers and norms whose MLPs are fused; the number of stages whose token mixers are fused, too.
WHOLE_STAGES = {
    "metaformer_s12_identity": 4, "metaformer_s12_layer_norm": 0, "metaformer_s12_pppf": 3, "poolformerv2_s12": 4,
    "identityformer_s12": 4, "randformer_s12": 2, "convformer_s18": 0, "caformer_s18": 0,
}  # fmt: skip


def network(size: int = 3, parts: BlockParts = POOLFORMER_PARTS) -> MetaFormer:
    """Return a network of four stages with drop path, whose parameters all affect the output."""

    def pooling(dim: int, side: int) -> Pooling:
        return Pooling(dim, side, size)

    architecture = Architecture((2, 1, 2, 1), (8, 16, 24, 32), [pooling] * 4, drop_path_rate=0.3, parts=parts)
    model = MetaFormer(architecture, num_classes=5)
    randomise(model)
    return model


def small(name: str) -> MetaFormer:
    """Return a named network with few blocks and channels, whose parameters all affect the output."""
    sizes = replace(COMPOSITIONS[name], depths=(1, 1, 2, 1), dims=(32, 32, 64, 32), drop_path_rate=0.3)
    model = create_model(sizes, 5, image_size=64)
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
    images = torch.randn(6, 3, 52, 70, dtype=torch.float64)
    found = assert_fused_is_plain(network(size, KINDS[kind]).double().train(training), images)
    assert not any(value.any() for name, value in found.items() if name.endswith("norm1.bias"))


@pytest.mark.parametrize("name", WHOLE_STAGES)
@pytest.mark.parametrize("training", [True, False])
def test_fused_networks_of_both_papers_are_the_plain_ones(name: str, training: bool) -> None:
    """The same holds for other mixers, which are plain or none, for norms over channels, and for scaled residuals."""
    model = small(name).double().train(training)
    assert len(fused.whole_stages(model)) == WHOLE_STAGES[name]
    assert_fused_is_plain(model, torch.randn(6, 3, 64, 64, dtype=torch.float64))


def assert_fused_is_plain(model: MetaFormer, images: Tensor) -> dict[str, Tensor]:
    """Fuse four stages, assert that logits and all gradients stay the same, and return them.

    Poolings cancel norm1's bias, so that its gradient consists of rounding errors.
    """
    expected = outcome(model, images)
    assert fuse(model) == 4
    found = outcome(model, images)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("norm1.bias") and value.abs().max() < 1e-10:
            assert found[name].abs().max() < 1e-10
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12 * float(value.abs().max()))
    return found


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


def test_compiles_with_plain_mixers_under_autocast() -> None:
    """Plain mixers between fused branches keep autocast's type in the compiled graph, as in the eager network."""
    blocks: Any = small("caformer_s18").eval().get_submodule("stages.3.blocks")
    results = []
    for run in (run_fused, torch.compile(run_fused, backend="aot_eager", fullgraph=True)):
        images = torch.ones(2, 32, 2, 2, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(blocks, images)
        out.sum().backward()
        results.append((out.detach(), images.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02 * float(eager.abs().max()))


@pytest.mark.parametrize("kind", [*KINDS, "identityformer_s12", "caformer_s18"])
@pytest.mark.parametrize("switch", [fuse, lambda _: None], ids=["fused", "plain"])
def test_gradients_have_the_strides_of_weights(kind: str, switch: Callable[[MetaFormer], object]) -> None:
    """A channels_last weight and its gradient have equal strides; otherwise distributed training warns and copies."""
    model = network(parts=KINDS[kind]) if kind in KINDS else small(kind)
    model = model.to(memory_format=torch.channels_last)
    switch(model)
    outcome(model, torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


def test_fusable_networks() -> None:
    """MLPs with GELU or StarReLU, a residual and one of both papers' norms are fusable, in all stages or in none.

    The token mixers that are fused, too, are poolings and identities after a norm over the image.
    """
    found = {}
    for name in VARIANTS:
        model = MetaFormer(replace(VARIANTS[name], depths=(1, 1, 1, 1), dims=(32,) * 4), num_classes=2, image_size=32)
        found[name] = len(fused.fusable_stages(model)), len(fused.whole_stages(model))
    plain = {name for name, (fusable, _) in found.items() if not fusable}
    others = ("batch_norm", "no_norm", "relu", "silu", "no_residual", "no_channel_mlp")
    assert plain == {f"metaformer_s12_{part}" for part in others}
    assert {fusable for fusable, _ in found.values()} == {0, 4}
    whole = {name for name, (_, count) in found.items() if count == 4}
    families = ("poolformer_", "poolformerv2_", "identityformer_")
    ablations = {f"metaformer_s12_{part}" for part in ("identity", "pool5", "pool7", "pool9")}
    assert whole == {name for name in VARIANTS if name.startswith(families)} | ablations
    assert {name: found[name][1] for name in WHOLE_STAGES} == WHOLE_STAGES


def test_state_dict_stays_the_same() -> None:
    """Fusing keeps the keys of the state dict, which still loads strictly into the plain network."""
    plain, changed = network(), network()
    fuse(changed)
    assert list(changed.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(changed.state_dict(), strict=True)


def shapes_checked(monkeypatch: pytest.MonkeyPatch, name: str, image_size: int) -> list[BlockShape]:
    """Return the shapes that a successful check runs."""
    shapes: list[BlockShape] = []

    def record(device: torch.device, dtype: torch.dtype | None, shape: BlockShape) -> float:
        shapes.append(shape)
        return 0.0

    monkeypatch.setattr(fused, "_relative_difference", record)
    small = replace(VARIANTS[name], depths=(1, 1, 1, 1))
    model = MetaFormer(small, num_classes=2, image_size=image_size)
    assert find_fault(model, image_size, torch.device("cuda"), torch.bfloat16) is None
    return shapes


def test_checked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check uses each fused stage's width, side, window in training, or no mixer, and its other parts."""
    parts, widths = BlockParts(layer_scale_init=0.5), (64, 128, 320, 512)
    for side, image_size in ((56, 224), (8, 32)):
        sides = (side, side // 2, side // 4, side // 8)
        for name, dims in (("poolformer_s12", widths), ("poolformer_m36", (96, 192, 384, 768))):
            expected = [BlockShape(dim, s, 3, 16, parts) for dim, s in zip(dims, sides, strict=True)]
            assert shapes_checked(monkeypatch, name, image_size) == expected
    assert shapes_checked(monkeypatch, "metaformer_s12_pool7", 224)[3] == BlockShape(512, 7, 7, 16, parts)
    assert [shape.window for shape in shapes_checked(monkeypatch, "metaformer_s12_ppff", 224)] == [3, 3, 0, 0]
    conv = replace(BASELINE_PARTS, norm=ChannelLayerNorm)
    kinds = {
        "poolformerv2_s12": (3, BASELINE_PARTS, SCALED_PARTS),
        "identityformer_s12": (0, BASELINE_PARTS, SCALED_PARTS),
        "caformer_s18": (0, conv, replace(conv, residual_scale=True, mlp_layer=LinearLayer)),
    }
    for name, (window, *both) in kinds.items():
        pairs = zip(widths, (56, 28, 14, 7), [both[0], both[0], both[1], both[1]], strict=True)
        expected = [BlockShape(dim, side, window, 16, each) for dim, side, each in pairs]
        assert shapes_checked(monkeypatch, name, 224) == expected
    assert shapes_checked(monkeypatch, "metaformer_s12_batch_norm", 224) == []


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
        "mix_backward": lambda *a: (1.2 * kernels.mix_backward(*a)[0],),
        "finish_sums": lambda *a: (kernels.finish_sums(*a)[0], kernels.finish_sums(*a)[1] * 1.2),
    }
    if kind == "PoolFormer":
        faults["gelu_backward"] = lambda *a: (
            kernels.gelu_backward(*a)[0],
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


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("poolformerv2_s12", "mix"), ("poolformerv2_s12", "mix_backward"), ("poolformerv2_s12", "normalize_backward"),
        ("identityformer_s12", "add_norm"), ("caformer_s18", "residual"), ("caformer_s18", "normalize_channels"),
        ("caformer_s18", "norm_backward"), ("identityformer_s12", "norm_backward"),
        ("identityformer_s12", "add_norm_backward"),
    ],
)  # fmt: skip
def test_a_wrong_result_of_any_kernel_is_found(monkeypatch: pytest.MonkeyPatch, name: str, kernel: str) -> None:
    """The check notices a tenth more in the last result that is no statistics, such as a residual scale's gradient."""
    model, right = small(name), getattr(REFERENCE, kernel)

    def wrong(*arguments: Any) -> Any:
        results = right(*arguments)
        if isinstance(results, Tensor):
            return results * 1.1
        changed = 0 if kernel in ("mix", "residual", "add_norm", "normalize_channels") else len(results) - 1
        return tuple(1.1 * result if i == changed else result for i, result in enumerate(results))

    assert find_fault(model, 64, CPU, None) is None
    broken = REFERENCE._replace(**{kernel: wrong})
    monkeypatch.setattr(operators, "triton_kernels", lambda: broken)
    assert (find_fault(model, 64, CPU, None) or "").startswith("they differ")
