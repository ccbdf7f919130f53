"""Tests of the fused operators with each set of kernels.

`test_operators.py` runs them with the reference kernels, with Triton kernels in its interpreter (in a separate process,
because Triton reads TRITON_INTERPRET when it is imported) and, on a machine with a GPU, with compiled Triton kernels.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metaformer.models.activations import StarReLU
from metaformer.models.channel_mlps import LinearLayer
from metaformer.models.fused import fuse, run_fused
from metaformer.models.kernels import operators
from metaformer.models.metaformer import (
    Architecture,
    BlockParts,
    MetaFormer,
    MetaFormerBlock,
    Stage,
    TokenMixer,
    run_plain,
)
from metaformer.models.norms import ChannelLayerNorm, GroupNormWithoutBias
from metaformer.models.token_mixers import Identity, Pooling, SeparableConv
from tests.models.reference_kernels import REFERENCE

EPS = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BASELINE_PARTS = BlockParts(GroupNormWithoutBias, StarReLU, layer_scale_init=None, mlp_bias=False)
KERNEL_SETS = ["interpreted"] if INTERPRETED else ["reference", *(["gpu"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [B, C, H, W]: odd sides and widths; one position, where strides are ambiguous; one image; more than one tile. In half
# types, the first two have one kernel for the MLP.
SHAPES = [(3, 48, 7, 5), (2, 16, 1, 1), (1, 3, 1, 9), (1, 34, 11, 13)]


BRANCHES = (operators.block, operators.identity_branch, operators.mlp_branch)  # the operators that have a gradient


class Call(NamedTuple):
    """An operator and its arguments."""

    operator: Any
    arguments: tuple[Any, ...]


@pytest.fixture(params=KERNEL_SETS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Select the kernels, and return the device on which the operators run."""
    if request.param == "reference":
        monkeypatch.setattr(operators, "triton_kernels", lambda: REFERENCE)
    return torch.device("cuda" if request.param == "gpu" else "cpu")


def calls(
    device: torch.device, shape: tuple[int, ...], stream: torch.dtype, product: torch.dtype, channels_last: bool
) -> Iterator[Call]:
    """Yield calls of all operators.

    `stream` is the type of images and parameters, and `product` that of the matrix products.
    """
    torch.manual_seed(0)
    batch, channels = shape[:2]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def normal(*size: int, dtype: torch.dtype = stream) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    x, grad = (normal(*shape).contiguous(memory_format=memory_format) for _ in range(2))
    hidden = 4 * channels
    sizes = [(channels,)] * 5 + [(hidden, channels), (hidden,), (channels, hidden), (channels,), (channels,)]
    parameters = list(operators.Parameters(*(normal(*size) for size in sizes)))
    stats = REFERENCE.statistics(x, EPS)
    yield Call(operators.statistics, (x, EPS))
    for keep in (None, torch.tensor([[0.0, 2.0, 2.0][:batch], [2.0, 0.0, 2.0][:batch]], device=device)):
        activation = "gelu" if keep is None else "squared_relu"
        out, scales = (stream, []) if keep is None else (product, [normal(channels), normal(channels)])
        between = torch.promote_types(stream, out)
        types = (product, between, out)
        block = Call(operators.block, (x, stats, parameters, keep, scales, 3, activation, EPS, EPS, *types))
        yield block
        saved = [tensor.clone() for tensor in operators.block(*block.arguments)[2:]]
        given = (parameters, keep, scales, saved, 3, activation, between)
        yield Call(operators.block_backward, (grad.to(out), x, stats, *given))
        keep1, scale, mlp = None if keep is None else keep[0].clone(), scales[:1], parameters[3:]
        yield Call(operators.identity_branch, (x, stats, parameters[:2], keep1, scale, EPS))
        yield Call(operators.identity_branch_backward, (grad, x, stats, parameters[0], keep1, scale))
        for norm_stats in (stats, None):
            branch = Call(operators.mlp_branch, (x, norm_stats, mlp, keep1, scale, activation, EPS, EPS, product))
            yield branch
            found, *saved = (tensor.clone() for tensor in operators.mlp_branch(*branch.arguments)[2:])
            used = found if norm_stats is None else stats
            yield Call(operators.mlp_branch_backward, (grad, used, mlp, keep1, scale, saved, activation))


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors in a nested value."""
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, type, device and strides, without the meaningless strides of dimensions of size 1."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.shape, tensor.dtype, tensor.device.type, strides


# The interpreter is slow: it runs the cases in which kernels differ, and reference kernels run all of them.
TYPES = [*((torch.float32, dtype) for dtype in DTYPES), (torch.bfloat16, torch.bfloat16)]
if INTERPRETED:
    TYPES.pop(1)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        *((shape, True) for shape in SHAPES[:-1]),
        *((shape, False) for shape in SHAPES[: 1 if INTERPRETED else -1]),
    ],
)
@pytest.mark.parametrize(("stream", "product"), TYPES)
def test_fakes_and_memory(
    device: torch.device, shape: tuple[int, ...], stream: torch.dtype, product: torch.dtype, channels_last: bool
) -> None:
    """Fakes return the real shapes, types and strides; results share no memory with each other or with arguments."""
    for operator, arguments in calls(device, shape, stream, product, channels_last):
        found = tensors(operator(*arguments))
        with FakeTensorMode() as mode:
            faked = operator(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        assert [layout(tensor) for tensor in tensors(faked)] == [layout(tensor) for tensor in found], operator
        found = [tensor for tensor in found if tensor.numel()]  # empty ones have no memory
        pointers = [tensor.untyped_storage().data_ptr() for tensor in [*found, *tensors(arguments)]]
        assert not {*pointers[: len(found)]} & {*pointers[len(found) :]}, operator
        assert len({*pointers[: len(found)]}) == len(found), operator


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize(("stream", "product"), TYPES[: 2 if INTERPRETED else None])
def test_operators_pass_opcheck(device: torch.device, stream: torch.dtype, product: torch.dtype) -> None:
    """The operators pass torch's checks of schemas, mutation, aliasing, symbolic sizes and compiled gradients."""
    tolerance = 1e-5 if stream == product == torch.float32 else 0.1
    for operator, arguments in calls(device, (3, 4, 3, 2), stream, product, True):
        if operator in BRANCHES:
            arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), arguments)
            stats, keep = (None if arguments[i] is None else arguments[i].detach() for i in (1, 3))
            arguments = (arguments[0], stats, arguments[2], keep, *arguments[4:])
        torch.library.opcheck(operator, arguments, rtol=tolerance, atol=tolerance)


def blocks_of(dim: int, window: int, layer_scale: float | None, device: torch.device) -> nn.Sequential:
    """Return two blocks with drop path, whose parameters all affect the output; without LayerScale, PoolFormerV2's."""

    def mixer(dim: int, side: int) -> Pooling:
        return Pooling(dim, side, window)

    torch.manual_seed(0)
    parts = BASELINE_PARTS if layer_scale is None else BlockParts(layer_scale_init=layer_scale)
    return random_blocks(dim, mixer, parts, device)


def random_blocks(dim: int, mixer: TokenMixer, parts: BlockParts, device: torch.device) -> nn.Sequential:
    blocks = nn.Sequential(*(MetaFormerBlock(dim, 7, mixer, 0.4, parts) for _ in range(2)))
    for name, parameter in blocks.named_parameters():
        if "layer_scale" not in name:
            nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
    return blocks.to(device)


def outcome(
    run: Callable[..., Tensor], blocks: nn.Sequential, images: Tensor, weight: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the output and all gradients under autocast to `dtype`; `weight` is the output's gradient."""
    torch.manual_seed(1)
    blocks.zero_grad()
    leaf = images.clone().requires_grad_()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        out = run(blocks, leaf)
    out.backward(weight.to(out.dtype).expand(out.shape))
    assert leaf.grad is not None
    gradients = {name: p.grad.clone() for name, p in blocks.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "images": leaf.grad, **gradients}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "layer_scale"),
    [
        *((shape, 0.5) for shape in SHAPES),
        *((shape, layer_scale) for shape in SHAPES[: 1 if INTERPRETED else None] for layer_scale in (1e-6, None)),
    ],
)
def test_blocks(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype | None, layer_scale: float | None
) -> None:
    """Output and gradients equal the plain blocks' up to similar rounding, for any layout of gradients.

    Drop path drops some images. A layer scale of 1e-6, as in the paper, is too small for float16. Blocks without one
    are PoolFormerV2's.
    """
    blocks = blocks_of(shape[1], 5 if shape[2] > 9 else 3, layer_scale, device).train()
    images = torch.randn(shape, device=device)
    gradients = {
        "channels_last": images.flip(0).contiguous(memory_format=torch.channels_last),
        "contiguous": images.flip(0).contiguous(),
        "strided": torch.randn(*shape[:3], 2 * shape[3], device=device)[..., ::2],
        "expanded": torch.randn(*shape[:2], 1, 1, device=device),
    }
    if INTERPRETED and (dtype is not None or shape != SHAPES[0] or layer_scale != 0.5):  # kernels get one layout
        gradients = {"strided": gradients["strided"]}
    assert_as_near_as_plain(blocks, images, gradients, dtype, layer_scale or 1)


SCALED_PARTS = replace(BASELINE_PARTS, residual_scale=True)
SECOND_PAPER: dict[str, tuple[TokenMixer, BlockParts]] = {
    "PoolFormerV2": (Pooling, SCALED_PARTS),
    "IdentityFormer": (Identity, SCALED_PARTS),
    "IdentityFormer's first stages": (Identity, BASELINE_PARTS),
    "CAFormer": (SeparableConv, replace(SCALED_PARTS, norm=ChannelLayerNorm, mlp_layer=LinearLayer)),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SECOND_PAPER)
def test_blocks_of_the_second_paper(device: torch.device, dtype: torch.dtype | None, kind: str) -> None:
    """Scaled residuals, no mixer or a plain one, and norms over channels, as in `test_blocks`."""
    torch.manual_seed(0)
    blocks = random_blocks(SHAPES[0][1], *SECOND_PAPER[kind], device).train()
    images = torch.randn(SHAPES[0], device=device)
    assert_as_near_as_plain(blocks, images, {"contiguous": images.flip(0).contiguous()}, dtype, 1)


def assert_as_near_as_plain(
    blocks: nn.Sequential, images: Tensor, gradients: dict[str, Tensor], dtype: torch.dtype | None, layer_scale: float
) -> None:
    """Assert that errors of output and gradients are similar to the plain blocks', for gradients of the output."""
    for name, weight in gradients.items():
        exact = outcome(run_plain, blocks.double(), images.double(), weight, None)
        blocks.float()
        plain = outcome(run_plain, blocks, images, weight, dtype)
        found = outcome(run_fused, blocks, images, weight, dtype)
        assert found.keys() == exact.keys()
        for key, value in exact.items():
            if not key.endswith("norm1.bias"):  # exactly zero in fused blocks, rounding errors in plain ones
                error, plain_error = ((other[key].double() - value).norm() for other in (found, plain))
                relative = 3e-5 if dtype is None else 2 * torch.finfo(dtype).eps  # as few as 3 values of that type
                absolute = 1e-6 * weight.norm() * (1 if key.endswith("scale") else layer_scale)
                relative *= 4 if value.numel() == 1 else 1  # one error, not the norm of many
                bound = 6 * plain_error + relative * value.norm() + absolute
                assert error <= bound, (name, key)


def test_backward_under_autocast(device: torch.device) -> None:
    """Gradients are bit-identical if backward is called inside autocast, too."""
    blocks, images = blocks_of(16, 3, 0.5, device), torch.randn(2, 16, 6, 5, device=device)
    expected = outcome(run_fused, blocks, images, images, torch.bfloat16)
    torch.manual_seed(1)
    blocks.zero_grad()
    with torch.autocast(device.type, torch.bfloat16):
        run_fused(blocks, images).backward(images)
    for name, parameter in blocks.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name


def test_float16_weight_gradient_does_not_overflow(device: torch.device) -> None:
    """fc2's float16 gradient may exceed 65504 before layer scale is applied; the result is finite and correct."""
    channels = 8
    x = torch.randn(2, channels, 16, 16, device=device)
    ones, zeros = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    matrices = [torch.zeros(32, channels, device=device), torch.randn(channels, 32, device=device)]
    parameters = [ones, zeros, ones, ones, zeros, matrices[0], torch.ones(32, device=device), matrices[1], zeros]
    parameters.append(torch.full_like(ones, 1e-3))
    stats, grad = REFERENCE.statistics(x, EPS), torch.full_like(x, 1000.0)
    types = (torch.float16, torch.float32, torch.float32)
    saved = list(operators.block(x, stats, parameters, None, [], 3, "gelu", EPS, EPS, *types)[2:])
    grads = operators.block_backward(grad, x, stats, parameters, None, [], saved, 3, "gelu", torch.float32)
    expected = 1000.0 * 2 * 16 * 16 * 0.8413447 * 1e-3  # gelu(1)
    torch.testing.assert_close(grads[8], torch.full_like(grads[8], expected), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter, which uses numpy
def test_gradient_scaler(device: torch.device) -> None:
    """With a scaler, float16 gradients at layer scale 1e-6 are the unscaled ones, and an overflow is noticed."""
    blocks, images = blocks_of(16, 3, 1e-6, device), torch.randn(2, 16, 6, 5, device=device)
    exact = outcome(run_plain, blocks.double(), images.double(), images, None)
    blocks.float().zero_grad()
    optimizer = torch.optim.SGD(blocks.parameters(), lr=0.0)
    for weight, overflows in ((images, False), (images * 1e35, True)):
        scaler = torch.amp.GradScaler(device.type, init_scale=1024)
        torch.manual_seed(1)
        with torch.autocast(device.type, torch.float16):
            out = run_fused(blocks, images)
        scaler.scale((out * weight).sum()).backward()
        scaler.unscale_(optimizer)
        found = list(scaler._found_inf_per_device(optimizer).values())
        assert any(value > 0 for value in found) == overflows
        if not overflows:
            for name, parameter in blocks.named_parameters():
                assert parameter.grad is not None
                if not name.endswith("norm1.bias"):
                    error = (parameter.grad.double() - exact[name]).norm()
                    assert error <= 4e-3 * exact[name].norm() + 1e-9, name
        optimizer.zero_grad()


def test_gradients_in_the_buckets_of_distributed_training(device: torch.device, tmp_path: Path) -> None:
    """Gradients that are views of DDP's buckets are bit-identical, in the first step and when they are accumulated."""
    blocks, images = blocks_of(16, 3, 0.5, device), torch.randn(2, 16, 6, 5, device=device)
    expected = outcome(run_fused, blocks, images, images, None)
    stage = Stage(nn.Identity(), list(blocks), None).to(memory_format=torch.channels_last)
    stage.run_blocks = run_fused
    stage.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(stage, gradient_as_bucket_view=True)
        for times in (1, 2):
            torch.manual_seed(1)
            wrapped(images).backward(images)
            for name, parameter in blocks.named_parameters():
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, times * expected[name]), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.whole  # compiling takes many seconds
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler for CPUs")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_by_inductor(device: torch.device, dtype: torch.dtype | None) -> None:
    """Compiled blocks have the output and the gradients of eager ones."""
    blocks, images = blocks_of(16, 3, 0.5, device).eval(), torch.randn(2, 16, 6, 5, device=device)
    expected = outcome(run_fused, blocks, images, images, dtype)
    with fresh_cache():  # the key of torch's cache has no part of the operators' code
        found = outcome(torch.compile(run_fused, fullgraph=True), blocks, images, images, dtype)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_network_of_36_blocks(device: torch.device) -> None:
    """Output and all gradients of the deepest network, with few channels, equal those of the plain path."""

    def pooling(dim: int, side: int) -> Pooling:
        return Pooling(dim, side, 3)

    torch.manual_seed(0)
    parts = BlockParts(layer_scale_init=0.1)
    model = MetaFormer(Architecture((6, 6, 18, 6), (8, 8, 16, 16), [pooling] * 4, parts=parts), num_classes=3)
    model = model.to(device)
    images = torch.randn(1, 3, 32, 32, device=device)
    results = []
    for kind in ("plain", "fused"):
        if kind == "fused":
            assert fuse(model) == 4
            model.float()
        else:
            model.double()
        model.zero_grad()
        logits = model(images.to(next(model.parameters()).dtype))
        logits.square().sum().backward()
        grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach().double(), **grads})
    for name, value in results[0].items():
        if not name.endswith("norm1.bias"):
            assert (results[1][name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


class FilledSizes(TorchDispatchMode):
    """A mode that records the number of elements of each tensor that is filled with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(word in str(func) for word in ("zero", "fill", "full")):
            self.sizes += [tensor.numel() for tensor in tensors(result)]
        return result


def test_no_gradient_is_filled_with_zeros(device: torch.device) -> None:
    """The backward pass allocates no zeros for outputs without a gradient, such as the large hidden layer."""
    blocks = blocks_of(16, 3, 0.5, device)
    images = torch.randn(2, 16, 6, 5, device=device, requires_grad=True)
    out = run_fused(blocks, images)
    with FilledSizes() as filled:
        out.backward(torch.ones_like(out))
    assert max(filled.sizes, default=0) <= 4 * 16, filled.sizes


def test_saved_outputs_are_not_differentiable(device: torch.device) -> None:
    """Outputs saved for the backward pass are not differentiable, since a gradient through them would be wrong."""
    for operator, arguments in itertools.islice(calls(device, (2, 8, 3, 3), torch.float32, torch.float32, True), 9):
        if operator in BRANCHES:
            images = arguments[0].requires_grad_()
            first, *others = operator(images, *arguments[1:])
            assert first.requires_grad
            assert not any(other.requires_grad for other in others)
            (grad,) = torch.autograd.grad(first, images, torch.ones_like(first))
            assert grad.isfinite().all()
