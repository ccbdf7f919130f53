"""All Triton kernels, compiled for GPUs on a machine without one, as the project's own functions launch them.

The everyday test compiles for one architecture. The slow one (`-m slow`) covers all architectures, widths and types.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="torch's CPU builds do not include triton")

from benchmarks.gpu.compiling import MAX_SHARED_BYTES, KernelLaunch, compiling
from metaformer.data.device import triton_kernel, triton_randaugment
from metaformer.models.kernels import operators
from metaformer.models.kernels.backend import triton_kernels

EPS = 1e-5
FLOAT32 = torch.float32
Types = tuple[torch.dtype, torch.dtype, torch.dtype]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Side and channels. The paper's networks at 224 px; and sizes that specialise otherwise: 1, or not divisible by 16.
S12 = ((56, 64), (28, 128), (14, 320), (7, 512))
M36 = ((56, 96), (28, 192), (14, 384), (7, 768))
ODD = ((9, 64), (1, 320), (13, 33))


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor that has no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_mixer(side: int, channels: int, window: int, dropped: bool, types: Types = (FLOAT32,) * 3) -> None:
    """Launch the kernels of the token mixer branch on 128 images.

    `types` are those of its input, its output and the matrix products.
    """
    kernels, shape = triton_kernels(), (128, side, side, channels)
    x, y, half = (new(*shape, dtype=dtype) for dtype in types)
    stats, scale, keep = new(128, 2), new(channels), new(128) if dropped else None
    factors = () if dropped or window > 3 else (scale,)
    kernels.mix(x, stats, scale, keep, window, EPS, y.dtype, *factors)
    parts = new(128, 7, channels)
    _, products, *_ = kernels.normalize_backward(half, half, stats, new(128, 16, 2), y, x, window, y.dtype, *factors)
    slopes, _ = kernels.finish_sums(products, parts, new(128, 4, 4 * channels), stats, scale, keep, x[0].numel())
    kernels.mix_backward(y, x, stats, scale, keep, slopes, window, *factors)


def launch_mlp(side: int, channels: int, dropped: bool, dtype: torch.dtype) -> None:
    """Launch the kernels of the channel MLP branch on 128 images, and those of the statistics."""
    kernels, shape = triton_kernels(), (128, side, side, channels)
    x, stats, vector = new(*shape), new(128, 2), new(channels)
    branch, hidden = new(*shape, dtype=dtype), new(*shape[:3], 4 * channels, dtype=dtype)
    fc1, fc2, bias1 = new(4 * channels, channels), new(channels, 4 * channels), new(4 * channels)
    keep, factor = new(128) if dropped else None, new(1)
    kernels.statistics(x, EPS)
    kernels.normalize(x, stats, dtype)
    kernels.fold_norms(fc1, bias1, *[vector] * 4, dtype)
    kernels.scale_rows(fc2, vector, vector, dtype)
    kernels.gelu(hidden)
    kernels.gelu_backward(hidden, hidden, factor, new(4 * channels, dtype=dtype), bias1)
    kernels.squared_relu(hidden)
    kernels.squared_relu_backward(hidden, hidden, factor, new(4 * channels, dtype=dtype), bias1)
    _, positions = kernels.normalize_channels(x, EPS, dtype)
    if operators._recomputes_hidden(channels, dtype):
        layers = [new(*size, dtype=dtype) for size in (fc1.shape, bias1.shape, fc2.shape, vector.shape)]
        for activation in ("gelu", "squared_relu"):
            for stream, scales in ((FLOAT32, ()), (dtype, (vector,))):
                kernels.mlp(x.to(stream), stats, *layers, factor, keep, activation, EPS, stream, *scales)
            backward = (branch, branch, *layers[:2], bias1, layers[2], factor, activation)
            kernels.mlp_backward(*backward)
    for scale in (None, vector):
        kernels.residual(x, branch, factor, keep, EPS, x.dtype, scale)
        kernels.add_norm(x, stats, vector, vector, keep, scale, EPS)
        kernels.add_norm_backward(x, x, stats, vector, keep, scale)
        for each in (stats, positions):
            kernels.norm_backward(branch, branch, each, new(128, 16, 2), x, scale)
    kernels.residual_backward(x, keep, dtype)
    kernels.fc1_gradients(fc1, fc1, *[vector] * 4, new(6 * channels))
    kernels.fc2_gradients(fc2, fc2, vector, vector, new(6 * channels))


def launch_transform(side: int) -> None:
    """Launch all variants of the transform of 128 images."""
    pixels = new(128, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    colours, boxes, keys = new(3, 1, 1), new(128, 4, dtype=torch.int64), new(128, dtype=torch.int64)
    for mixing in (None, (new(1), boxes[:1])):
        for erasing in (None, (keys, boxes, keys)):
            triton_kernel.transform(pixels, colours, colours, mixing, erasing)


def launch_randaugment(side: int) -> None:
    """Launch RandAugment's kernels on 128 images."""
    pixels = new(128, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    kinds, numbers = new(1, 128, dtype=torch.int32), new(1, 128, triton_randaugment.NUMBERS, dtype=torch.float64)
    triton_randaugment.augment(pixels, kinds, numbers, (124, 116, 104))


@pytest.fixture
def launches(request: pytest.FixtureRequest) -> Iterator[list[KernelLaunch]]:
    """The launches that a test makes, compiled for the architecture that is the fixture's parameter, and checked.

    Kernels with matrix products use the tensor cores, with the architecture's own instructions.
    """
    found: list[KernelLaunch] = []
    with compiling(request.param, found.append):
        yield found
    assert found
    for facts in {launch.facts for launch in found}:
        assert facts.stack_bytes == 0, facts
        assert bool(facts.products) == facts.name.startswith("mlp."), facts
        assert facts.shared_bytes <= MAX_SHARED_BYTES[facts.arch], facts


@pytest.mark.parametrize("launches", [90], indirect=True)
def test_kernels_of_training(launches: list[KernelLaunch]) -> None:
    """Kernels of S12's first stage, the transform and RandAugment compile without spills, and load in wide vectors."""
    launch_mixer(56, 64, 3, True, (FLOAT32, FLOAT32, torch.bfloat16))
    launch_mlp(56, 64, False, torch.bfloat16)
    launch_transform(224)
    launch_randaugment(224)
    for facts in (launch.facts for launch in launches):
        if (
            facts.name.partition(".")[0] in ("branches", "mixer", "mlp", "norm", "elementwise")
            and "finish" not in facts.name
        ):
            assert max(facts.loads) == 128, facts.name


@pytest.mark.parametrize("launches", [90], indirect=True)
def test_randaugment_rounds_as_torch_does(launches: list[KernelLaunch]) -> None:
    """No product and sum of RandAugment are one instruction, which would round once where torch rounds twice."""
    launch_randaugment(224)
    assert {launch.facts.name: launch.facts.fused_multiply_adds for launch in launches} == {
        "randaugment.tabulate": 0,
        "randaugment.augment": 0,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # 6 minutes on a busy machine, if nothing is in Triton's cache
@pytest.mark.parametrize("launches", [80, 89, 90, 100], indirect=True, ids="sm_{}".format)
@pytest.mark.parametrize("shapes", [S12, M36, ODD], ids=["s12", "m36", "odd"])
def test_all_kernels(launches: list[KernelLaunch], shapes: tuple[tuple[int, int], ...]) -> None:
    """All kernels in all types, with and without drop path, compile without spills on all architectures."""
    for side, channels in shapes:
        for dropped in (True, False):
            launch_mixer(side, channels, 3, dropped)
            for dtype in TYPES:
                launch_mlp(side, channels, dropped, dtype)
        launch_mixer(side, channels, 3, True, (torch.bfloat16,) * 3)
    for size in (224, 37):
        launch_transform(size)
        launch_randaugment(size)


@pytest.mark.slow
@pytest.mark.parametrize("launches", [80, 89, 90, 100], indirect=True, ids="sm_{}".format)
@pytest.mark.parametrize("window", [5, 7, 9])
def test_wide_windows(request: pytest.FixtureRequest, launches: list[KernelLaunch], window: int) -> None:
    """The ablations' windows compile in all stages without spills, except window 7 on sm_89."""
    if window == 7 and request.node.callspec.params["launches"] == 89:
        request.applymarker(pytest.mark.xfail(reason="mixer.apply_gradient spills 16 to 32 bytes"))
    for side, channels in S12:
        launch_mixer(side, channels, window, True)
