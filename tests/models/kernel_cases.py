"""Tests of the Triton kernels against the reference kernels in float64, for two runners.

`test_kernels.py` runs them in Triton's interpreter on the CPU, in a separate process because Triton reads
TRITON_INTERPRET when it is imported. `test_kernels_gpu.py` runs them compiled on a GPU.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metaformer.models.kernels.backend import Kernels, triton_kernels
from tests.models import reference_kernels as reference

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
EPS = 1e-5
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative to the norm; half types round
# [B, H, W, C]: reduced stages of S12 and M36; odd sides; one row; more than one tile of positions and of channels.
SHAPES = [(2, 4, 4, 64), (1, 2, 3, 320), (2, 1, 1, 192), (3, 7, 5, 40), (1, 1, 9, 3), (2, 13, 11, 33)]
# Half types are tested with some of the shapes only.
SHAPES_AND_TYPES = [
    *((shape, torch.float32) for shape in SHAPES),
    *((shape, dtype) for shape in SHAPES[2:4] for dtype in (torch.bfloat16, torch.float16)),
]
STRIPS = (1, 19, 17, 3)  # two strips of the mixer along the rows, the second one shorter, and two along the columns
MANY = 16384  # images
Draw = Callable[..., Tensor]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return triton_kernels()


@pytest.fixture
def draw() -> Draw:
    """Return a function that draws normal numbers of a shape, the same in each run."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) + mean).to(DEVICE, dtype)

    return normal


def exact(*values: Any) -> Any:
    """Convert tensors and dtypes to float64."""
    doubled = (v.double() if isinstance(v, Tensor) else v for v in values)
    return tuple(torch.float64 if isinstance(v, torch.dtype) else v for v in doubled)


def assert_near(found: Any, expected: Any, dtype: torch.dtype, *others: torch.dtype) -> None:
    """Assert that each result is within its type's tolerance of the float64 result.

    `dtype` is the type of the first result, and `others` are the types of further results.
    """
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    for result, wanted, kind in zip(found, expected, [dtype, *others], strict=True):
        assert result.dtype == kind
        error = (result.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
        assert error <= TOLERANCES[kind] or float(wanted.norm()) == float(result.norm()) == 0, float(error)


def keep_factors(batch: int) -> Tensor:
    """Return drop path's factors at rate .5, with the first image dropped."""
    return torch.tensor([0.0, 2.0, 2.0][:batch], device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_statistics(kernels: Kernels, draw: Draw, shape: tuple[int, ...], mean: float) -> None:
    """Statistics are exact even if the mean is 100 deviations, because squares are summed around the mean."""
    x = draw(*shape, mean=mean)
    found, expected = kernels.statistics(x, EPS), reference.statistics(x.double(), EPS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_TYPES)
def test_norm(kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The norm's output has the products' type, and the stream is float32."""
    x = draw(*shape, mean=1.0)
    arguments = (x, reference.statistics(x, EPS), dtype)
    assert_near(kernels.normalize(*arguments), reference.normalize(*exact(*arguments)), dtype)


def mixer_arguments(draw: Draw, shape: tuple[int, ...], dropped: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Return x, its statistics, scale (one of them zero) and drop path's factors."""
    x, scale = draw(*shape, mean=1.0, dtype=dtype), draw(shape[3])
    scale[0] = 0
    return x, reference.statistics(x, EPS), scale, keep_factors(shape[0]) if dropped else None


MIXERS = [
    *((shape, 3, bool(n % 2)) for n, shape in enumerate(SHAPES)),
    *((shape, s, True) for shape in ((2, 3, 6, 8), STRIPS) for s in (5, 7, 9)),
    (STRIPS, 3, False),
]


@pytest.mark.parametrize(("shape", "size", "dropped"), MIXERS)
def test_mixer_and_its_gradient(kernels: Kernels, draw: Draw, shape: tuple[int, ...], size: int, dropped: bool) -> None:
    """All windows, including ones larger than the image, with one scale of zero, and with and without drop path."""
    arguments = mixer_arguments(draw, shape, dropped)
    found, expected = (
        kernels.mix(*arguments, size, EPS, torch.float32),
        reference.mix(*exact(*arguments, size, EPS, torch.float32)),
    )
    assert_near(found, expected, torch.float32, torch.float32)
    backward = (draw(*shape), *arguments, draw(shape[0]), size)
    assert_near(kernels.mix_backward(*backward), reference.mix_backward(*exact(*backward)), torch.float32)


@pytest.mark.parametrize(("shape", "size", "dropped"), MIXERS)
def test_gradient_of_the_norm(kernels: Kernels, draw: Draw, shape: tuple[int, ...], size: int, dropped: bool) -> None:
    """The gradient of the norm's input, its products with the mixer's, and their sums with those of the MLP."""
    x, stats, scale, keep = mixer_arguments(draw, shape, dropped)
    norm_sums = draw(shape[0], 5, 2) * x[0].numel()
    backward = (draw(*shape), draw(*shape), stats, norm_sums, draw(*shape), x, size, torch.float32)
    found, products = kernels.normalize_backward(*backward)
    expected, expected_products = reference.normalize_backward(*exact(*backward))
    assert_near(found, expected, torch.float32)
    # The sums over positions nearly cancel, so their float32 error is bounded relative to the terms.
    bound = 1e-5 * found.norm() * (x - x.mean()).norm()
    assert (products.sum(1) - expected_products.sum(1)).norm() <= bound
    parts = [draw(shape[0], count, n * shape[3]) for count, n in ((3, 1), (17, 1), (35, 4))]
    arguments = (*parts, stats, scale, keep, x[0].numel())
    summed = kernels.finish_sums(*arguments)
    assert_near(summed, reference.finish_sums(*exact(*arguments)), torch.float32, torch.float32)


@pytest.mark.parametrize("shape", [*SHAPES[:4], STRIPS])
def test_residual_scale(kernels: Kernels, draw: Draw, shape: tuple[int, ...]) -> None:
    """A factor per channel on the input of both branches, one of them zero, and its gradient."""
    x, stats, scale, keep = mixer_arguments(draw, shape, shape[0] > 1)
    factor, grad = draw(shape[3]), draw(*shape)
    factor[0] = 0
    norm_sums, slopes = draw(shape[0], 5, 2) * x[0].numel(), draw(shape[0])
    calls = {
        "mix": (x, stats, scale, keep, 3, EPS, torch.float32, factor),
        "residual": (x, grad, draw(1), keep, EPS, torch.float32, factor),
        "mix_backward": (grad, x, stats, scale, keep, slopes, 3, factor),
        "normalize_backward": (x, draw(*shape), stats, norm_sums, grad, x, 3, torch.float32, factor),
    }
    for name, arguments in calls.items():
        found, expected = getattr(kernels, name)(*arguments), getattr(reference, name)(*exact(*arguments))
        if name == "normalize_backward":  # test_gradient_of_the_norm compares the products
            found, expected = (found[0], found[2]), (expected[0], expected[2])
        assert_near(found, expected, torch.float32, torch.float32)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_TYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norm", ["image", "channels"])
def test_norm_of_a_branch(
    kernels: Kernels, draw: Draw, norm: str, shape: tuple[int, ...], dtype: torch.dtype, scaled: bool
) -> None:
    """The norm over the channels of each position, and the gradient of both norms with that of the residual."""
    x, factor = draw(*shape, mean=1.0), draw(shape[3]) if scaled else None
    normed, stats = kernels.normalize_channels(x, EPS, dtype)
    expected, expected_stats = reference.normalize_channels(*exact(x, EPS, dtype))
    assert_near(normed, expected, dtype)
    torch.testing.assert_close(stats.double(), expected_stats, rtol=1e-5, atol=1e-6)
    if norm == "image":
        stats = reference.statistics(x, EPS)
    norm_sums = draw(shape[0], 5, 2) * x[0].numel()
    backward = (draw(*shape, dtype=dtype), draw(*shape, dtype=dtype), stats, norm_sums, draw(*shape), factor)
    found, wanted = kernels.norm_backward(*backward), reference.norm_backward(*exact(*backward))
    assert_near(found, wanted, *[torch.float32] * (1 + scaled))


def test_norm_over_channels_sums_many_rows(kernels: Kernels, draw: Draw) -> None:
    """Several programs, each with several tiles, sum all rows; the gradient is that of torch's layer norm."""
    x, grad, factor = draw(1, 40, 30, 64), draw(1, 40, 30, 64), draw(64)
    normed, stats = kernels.normalize_channels(x, EPS, torch.float32)
    found = kernels.norm_backward(grad, normed, stats, stats, x, factor)
    leaf = x.double().requires_grad_()
    (own,) = torch.autograd.grad(torch.nn.functional.layer_norm(leaf, [64], eps=EPS), leaf, grad.double())
    assert_near(found, (own + x * factor, x.double().square().sum((0, 1, 2))), torch.float32, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_added_norm_and_its_gradient(kernels: Kernels, draw: Draw, shape: tuple[int, ...], scaled: bool) -> None:
    """The norm as a branch, with and without a residual scale and drop path; the gradient is that of autograd."""
    x, stats, weight, keep = mixer_arguments(draw, shape, shape[0] > 1)
    bias, factor, grad = draw(shape[3]), draw(shape[3]) if scaled else None, draw(*shape)
    arguments = (x, stats, weight, bias, keep, factor, EPS)
    assert_near(kernels.add_norm(*arguments), reference.add_norm(*exact(*arguments)), torch.float32, torch.float32)
    backward = (grad, x, stats, weight, keep, factor)
    expected = reference.add_norm_backward(*exact(*backward))
    assert_near(kernels.add_norm_backward(*backward), expected, *[torch.float32] * (3 + scaled))
    leaf, *others = exact(x, weight, bias, keep, factor, EPS)
    leaf.requires_grad_()
    y, _ = reference.add_norm(leaf, reference.statistics(leaf, EPS), *others)
    torch.testing.assert_close(expected[0], torch.autograd.grad(y, leaf, grad.double())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stream", [torch.float32, None])
def test_mixer_in_half_precision(kernels: Kernels, draw: Draw, dtype: torch.dtype, stream: torch.dtype | None) -> None:
    """Its input may have the products' type, and its output the same or float32; sums are still float32."""
    shape, stream = (2, 5, 7, 64), stream or dtype
    arguments = mixer_arguments(draw, shape, True, dtype)
    mixed = kernels.mix(*arguments, 3, EPS, stream)[0]
    assert_near(mixed, reference.mix(*exact(*arguments, 3, EPS, stream))[0], stream)
    grad, normed, residual_grad = (draw(*shape, dtype=dtype) for _ in range(3))
    backward = (grad, normed, arguments[1], draw(2, 3, 2), residual_grad, arguments[0], 3, stream)
    found, products = kernels.normalize_backward(*backward)
    expected, expected_products = reference.normalize_backward(*exact(*backward))
    assert_near(found, expected, stream)
    assert (products.sum(1) - expected_products.sum(1)).norm() <= 2 * TOLERANCES[stream] * expected_products.norm()
    backward = (draw(*shape, dtype=stream), *arguments, draw(2), 3)
    assert_near(kernels.mix_backward(*backward), reference.mix_backward(*exact(*backward)), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_weights_and_their_gradients(kernels: Kernels, draw: Draw, dtype: torch.dtype) -> None:
    """Norm and layer scale are folded into the layers, and sums over positions give the gradients of parameters."""
    channels = 40  # several tiles of rows and of columns, which are not full
    fc1, bias1 = draw(4 * channels, channels), draw(4 * channels)
    fc2, bias2, scale = draw(channels, 4 * channels), draw(channels), draw(channels) * 1e-6
    norm = [draw(channels), draw(channels)]
    norm[0][0] = scale[1] = 0
    mixer = [draw(channels), draw(channels)]
    folded = (fc1, bias1, *norm, *mixer, dtype)
    matrix, bias, row_sums, mixer_product = kernels.fold_norms(*folded)
    expected = reference.fold_norms(*exact(*folded))
    assert_near((matrix, bias, mixer_product), (*expected[:2], expected[3]), dtype, dtype, torch.float32)
    assert_near(row_sums, matrix.double().sum(1), torch.float32)  # of rounded values, as the products are
    scaled = (fc2, bias2, scale, dtype)
    assert_near(kernels.scale_rows(*scaled), reference.scale_rows(*exact(*scaled)), dtype, dtype, torch.float32)
    sums, correlation = draw(6 * channels), draw(channels, 4 * channels)
    backward = (correlation, fc2, bias2, scale, sums)
    assert_near(kernels.fc2_gradients(*backward), reference.fc2_gradients(*exact(*backward)), *[torch.float32] * 3)
    others = (correlation.t().contiguous(), fc1, *norm, *mixer, sums)
    assert_near(kernels.fc1_gradients(*others), reference.fc1_gradients(*exact(*others)), *[torch.float32] * 7)


def test_layer_scale_of_zero(kernels: Kernels, draw: Draw) -> None:
    """Layer scale that is all zeros gives zeros, not NaN."""
    matrix, bias, magnitude = kernels.scale_rows(draw(8, 32), draw(8), torch.zeros(8, device=DEVICE), torch.float32)
    assert not matrix.any()
    assert not bias.any()
    assert 0 < magnitude < 1e-37


def test_a_constant_image_passes_the_mixer_unchanged(kernels: Kernels) -> None:
    """Padding does not count, so a window's average is the constant even at the borders."""
    x = torch.full((1, 5, 6, 8), 3.0, device=DEVICE)
    mixed, _ = kernels.mix(x, reference.statistics(x, EPS), torch.ones(8, device=DEVICE), None, 3, EPS, x.dtype)
    torch.testing.assert_close(mixed, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 7, 130), (1, 17, 17, 8)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["gelu", "squared_relu"])
def test_activation_and_its_gradient(
    kernels: Kernels, draw: Draw, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The activation of small and large numbers, its gradient with a factor that underflows in float16, and sums."""
    forward, backward = (getattr(kernels, each) for each in (name, f"{name}_backward"))
    hidden, grad, factor = draw(*shape, dtype=dtype) * 3, draw(*shape, dtype=dtype) * 1e4, draw(1).abs() * 1e-6
    assert_near(forward(hidden), getattr(reference, name)(hidden.double()), dtype)
    others = (hidden, factor, draw(shape[3], dtype=dtype), draw(shape[3]))
    expected = getattr(reference, f"{name}_backward")(*exact(grad.clone(), *others))
    found, sums, norm_sums = backward(grad.clone(), *others)
    assert_near((found, sums.sum(1)), (expected[0], expected[1].sum(1)), dtype, torch.float32)
    terms = expected[0].norm() * max(others[3].norm(), (hidden - others[2]).norm())
    assert (norm_sums.sum(1) - expected[2].sum(1)).norm() <= 1e-6 * terms
    leaf = hidden.double().requires_grad_()
    activation = torch.nn.functional.gelu(leaf) if name == "gelu" else leaf.relu().square()
    (own,) = torch.autograd.grad(activation, leaf, grad.double() * factor)
    torch.testing.assert_close(expected[0], own)


def test_error_of_gelu(kernels: Kernels) -> None:
    """GELU and its derivative are within 5e-7 of their float64 values, and correct for large numbers and NaN."""
    hidden = torch.linspace(-8, 8, 256 * 128, device=DEVICE).view(1, 1, 256, 128)
    others = (hidden, torch.ones(1, device=DEVICE), *torch.zeros(2, 128, device=DEVICE))
    expected = reference.gelu_backward(torch.ones_like(hidden, dtype=torch.float64), *exact(*others))
    derivative, *_ = kernels.gelu_backward(torch.ones_like(hidden), *others)
    assert (derivative.double() - expected[0]).abs().max() < 5e-7
    assert (kernels.gelu(hidden).double() - reference.gelu(hidden.double())).abs().max() < 5e-7
    large = torch.tensor([[-1e20, -50.0, -0.0, 0.0, 50.0, 1e30, torch.nan]], device=DEVICE)[:, None, None]
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 50.0, 1e30, torch.nan], device=DEVICE)
    torch.testing.assert_close(kernels.gelu(large).flatten(), wanted, rtol=1e-7, atol=1e-9, equal_nan=True)


# Two tiles of positions; channels that fill no tile; few channels; several tiles of a program, and two programs.
MLPS = [(2, 9, 8, 64), (2, 3, 5, 40), (1, 1, 9, 3), (3, 2, 3, 96), (1, 31, 17, 16), (2, 4, 4, 128)]


@pytest.mark.parametrize("shape", MLPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
def test_mlp_in_one_kernel(
    kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, activation: str
) -> None:
    """The whole branch, its backward pass that computes the hidden layer again, and all sums.

    The reference rounds where the kernels do, but a number near the middle of two may be rounded to the other one.
    """
    channels, keep = shape[3], keep_factors(shape[0]) if shape[0] > 1 else None
    x, factor, stream = draw(*shape, mean=1.0), draw(1), torch.float32 if shape[0] != 3 else dtype
    x = x.to(stream)
    fc1, fc2 = draw(4 * channels, channels, dtype=dtype), draw(channels, 4 * channels, dtype=dtype)
    fc1, fc2 = fc1 * channels**-0.5, fc2 * (4 * channels) ** -0.5
    bias1, bias2 = draw(4 * channels, dtype=dtype), draw(channels, dtype=dtype)
    layers, scale = (fc1, bias1, fc2, bias2, factor), (draw(channels),) if activation == "squared_relu" else ()
    stats = reference.statistics(x, EPS)
    normed, *found = kernels.mlp(x, stats, *layers, keep, activation, EPS, stream, *scale)
    keep_exact = None if keep is None else keep.double()
    others = [each.double() for each in (factor, *scale)]
    exact_layers = *layers[:4], others[0], keep_exact, activation, EPS, torch.float64, *others[1:]
    _, *expected = reference.mlp(x.double(), stats.double(), *exact_layers)
    assert_near(normed, reference.normalize(*exact(x, stats, dtype)), dtype)
    assert found[0].dtype == stream
    tolerance = 4e-4 if stream == torch.float32 else TOLERANCES[dtype]
    assert (found[0] - expected[0]).norm() <= tolerance * expected[0].norm()
    assert_near(found[1], reference.statistics(found[0].double(), EPS), torch.float32)
    grad, row_sums = draw(*shape, dtype=dtype), fc1.float().sum(1)
    backward = (grad, normed, fc1, bias1, row_sums, fc2, factor, activation)
    grad_hidden, activated, sums, norm_sums = kernels.mlp_backward(*backward)
    wanted = reference.mlp_backward(*exact(*backward))
    assert_near((grad_hidden, activated), wanted[:2], dtype, dtype)
    assert_near(sums.sum(1), wanted[2].sum(1), torch.float32)
    terms = wanted[0].norm() * (normed.double().norm() * fc1.double().norm() + row_sums.norm())
    assert (norm_sums.sum(1) - wanted[3].sum(1)).norm() <= 1e-6 * terms


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_TYPES)
def test_residual_and_its_gradient(kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A factor and drop path on a branch in the products' type; the sum is float32 or of that type."""
    x, branch, factor = draw(*shape), draw(*shape, dtype=dtype), draw(1)
    keep = keep_factors(shape[0]) if shape[0] > 1 else None
    for out in {torch.float32, dtype}:
        found = kernels.residual(x, branch, factor, keep, EPS, out)
        expected = reference.residual(*exact(x, branch, factor, keep, EPS, out))
        assert_near(found[0], expected[0], out)
        assert_near(found[1], reference.statistics(found[0].double(), EPS), torch.float32)
        grad, sums = kernels.residual_backward(x.to(out), keep, dtype)
        expected = reference.residual_backward(*exact(x.to(out), keep, dtype))
        assert_near((grad, sums.sum(1)), (expected[0], expected[1].sum(1)), dtype, torch.float32)


def test_the_same_input_gives_the_same_bits(kernels: Kernels, draw: Draw) -> None:
    """Sums are added in a fixed order, so repeated calls are bit-identical."""
    shape = (2, 13, 11, 33)
    x, grad = draw(*shape), draw(*shape)
    arguments = (grad, x, reference.statistics(x, EPS), draw(2, 3, 2), grad, x, 3, torch.float32)
    first, second = (kernels.normalize_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def last_image_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run only the last 16,384th of the programs along an axis that has so many."""
    from triton.runtime import interpreter

    def last(*limits: int) -> range:
        share = limits[0] // MANY if len(limits) == 1 else 0
        return range(limits[0] - share, limits[0]) if share else range(*limits)

    monkeypatch.setattr(interpreter, "range", last, raising=False)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs 30 GB, of which the interpreter touches only the last image")
@pytest.mark.usefixtures("last_image_only")
def test_offsets_beyond_two_billion(kernels: Kernels, draw: Draw) -> None:
    """With 16,384 images a tensor of the first stage has 3.3 billion elements, and the last image is still correct."""
    shape, half = (56, 56, 64), torch.float16

    def many(last: Tensor) -> Tensor:
        tensor = torch.empty((MANY, *last.shape[1:]), dtype=last.dtype)
        tensor[-1:] = last
        return tensor

    x, grad, scale = draw(1, *shape, dtype=half), draw(1, *shape, dtype=half), draw(shape[2])
    stats, keep = reference.statistics(x, EPS), torch.tensor([2.0])
    xs, grads, all_stats, all_keep = many(x), many(grad), many(stats), many(keep[:, None])[:, 0]
    assert xs.numel() > 2**31
    assert_near(kernels.statistics(xs, EPS)[-1:], reference.statistics(x.double(), EPS), torch.float32)
    mixed, mixed_stats = kernels.mix(xs, all_stats, scale, all_keep, 3, EPS, half)
    expected = reference.mix(*exact(x, stats, scale, keep, 3, EPS, half))
    assert_near((mixed[-1:], mixed_stats[-1:]), expected, half, torch.float32)
    assert_near(kernels.normalize(xs, all_stats, half)[-1:], reference.normalize(*exact(x, stats, half)), half)
    summed, _ = kernels.residual(xs, grads, keep, all_keep, EPS, half)
    assert_near(summed[-1:], reference.residual(*exact(x, grad, keep, keep, EPS, half))[0], half)
    kept, branch_sums = kernels.residual_backward(grads, all_keep, half)
    expected = reference.residual_backward(*exact(grad, keep, half))
    assert_near((kept[-1:], branch_sums[-1:].sum(1)), (expected[0], expected[1][:, 0]), half, torch.float32)
    assert_near(kernels.gelu(xs)[-1:], reference.gelu(x.double()), half)
    norm_sums = draw(1, 2, 2)
    found, products = kernels.normalize_backward(grads, xs, all_stats, many(norm_sums), xs, xs, 3, half)
    wanted = reference.normalize_backward(*exact(grad, x, stats, norm_sums, x, x, 3, half))
    assert_near(found[-1:], wanted[0], half)
    arguments = (products, branch_sums, torch.zeros(MANY, 1, 256), all_stats, scale, all_keep, x[0].numel())
    slopes, sums = kernels.finish_sums(*arguments)
    expected = reference.finish_sums(*exact(*(a[-1:] for a in arguments[:4]), scale, keep, x[0].numel()))
    assert_near((slopes[-1:], sums[-1:]), expected, torch.float32, torch.float32)
    (backward,) = kernels.mix_backward(grads, xs, all_stats, scale, all_keep, slopes, 3)
    assert_near(backward[-1:], reference.mix_backward(*exact(grad, x, stats, scale, keep, slopes[-1:], 3)), half)
    others = (draw(64), draw(64))
    found = kernels.gelu_backward(grads, xs, keep, *others)[0][-1:, -1, -1]
    assert_near(found, reference.gelu_backward(*exact(grad, x, keep, *others))[0][:, -1, -1], half)
    layers = [draw(*size, dtype=half) for size in ((256, 64), (256,), (64, 256), (64,))]
    _, summed, _ = kernels.mlp(xs, all_stats, *layers, keep, all_keep, "gelu", EPS, half)
    _, sum_of_one, _ = reference.mlp(*exact(x, stats, *layers, keep, keep, "gelu", EPS, half))
    assert_near(summed[-1:], sum_of_one, half)
    narrow, narrow_grad = draw(1, 56, 56, 16, dtype=half), draw(1, 56, 56, 16, dtype=half)
    layers = [draw(*size, dtype=half) for size in ((64, 16), (64,), (16, 64))]
    of_mlp = (*layers[:2], draw(64), layers[2], keep, "gelu")
    hidden_grads, activated, *_ = kernels.mlp_backward(many(narrow_grad), many(narrow), *of_mlp)
    assert hidden_grads.numel() > 2**31
    wanted = reference.mlp_backward(*exact(narrow_grad, narrow, *of_mlp))
    assert_near((hidden_grads[-1:], activated[-1:]), wanted[:2], half, half)
