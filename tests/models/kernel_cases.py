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
def test_norm_and_its_gradient(kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The norm's output and gradient have the products' type, the stream is float32, and one weight is zero."""
    x, grad, residual_grad = draw(*shape, mean=1.0), draw(*shape, dtype=dtype), draw(*shape)
    weight, bias = draw(shape[3]), draw(shape[3])
    weight[0] = 0
    stats = reference.statistics(x, EPS)
    arguments = (x, stats, weight, bias, dtype)
    assert_near(kernels.normalize(*arguments), reference.normalize(*exact(*arguments)), dtype)
    backward = (grad, x, stats, weight, residual_grad)
    expected = reference.normalize_backward(*exact(*backward))
    assert_near(kernels.normalize_backward(*backward), expected, *[torch.float32] * 3)


@pytest.mark.parametrize(
    ("shape", "size", "dropped"),
    [
        *((shape, 3, bool(n % 2)) for n, shape in enumerate(SHAPES)),
        *((shape, s, True) for shape in ((2, 3, 6, 8), STRIPS) for s in (5, 7, 9)),
        (STRIPS, 3, False),
    ],
)
def test_mixer_and_its_gradient(kernels: Kernels, draw: Draw, shape: tuple[int, ...], size: int, dropped: bool) -> None:
    """All windows, including ones larger than the image, with one scale of zero, and with and without drop path."""
    x, grad, scale = draw(*shape, mean=1.0), draw(*shape), draw(shape[3])
    scale[0] = 0
    arguments = (x, reference.statistics(x, EPS), scale, keep_factors(shape[0]) if dropped else None, size)
    found, stats = kernels.mix(*arguments, EPS)
    expected, expected_stats = reference.mix(*exact(*arguments, EPS))
    assert_near((found, stats), (expected, expected_stats), torch.float32, torch.float32)
    expected_backward = reference.mix_backward(*exact(grad, *arguments))
    grad_x, grad_scale = kernels.mix_backward(grad, *arguments)
    assert_near(grad_x, expected_backward[0], torch.float32)
    # The sums over positions nearly cancel, so their float32 error is bounded relative to the terms.
    bound = 1e-5 * grad.norm() * (x - x.mean()).norm() * arguments[1][:, 1].max()
    assert (grad_scale.double() - expected_backward[1]).norm() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixer_of_a_stream_in_half_precision(kernels: Kernels, draw: Draw, dtype: torch.dtype) -> None:
    """The stream may have the products' type; sums are still float32."""
    x, grad, scale = draw(2, 5, 7, 64, dtype=dtype), draw(2, 5, 7, 64, dtype=dtype), draw(64)
    arguments = (x, reference.statistics(x, EPS), scale, keep_factors(2), 3)
    assert_near(kernels.mix(*arguments, EPS)[0], reference.mix(*exact(*arguments, EPS))[0], dtype)
    found, expected = kernels.mix_backward(grad, *arguments), reference.mix_backward(*exact(grad, *arguments))
    assert_near(found[0], expected[0], dtype)


def test_a_constant_image_passes_the_mixer_unchanged(kernels: Kernels) -> None:
    """Padding does not count, so a window's average is the constant even at the borders."""
    x = torch.full((1, 5, 6, 8), 3.0, device=DEVICE)
    mixed, _ = kernels.mix(x, reference.statistics(x, EPS), torch.ones(8, device=DEVICE), None, 3, EPS)
    torch.testing.assert_close(mixed, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 7, 130), (1, 17, 17, 8)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("factor", [None, 1e-6])
def test_gelu_and_its_gradient(
    kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, factor: float | None
) -> None:
    """GELU of small and large numbers, its gradient with a factor, the gradient's sum over rows, GELU recomputed."""
    hidden, grad = draw(*shape, dtype=dtype) * 3, draw(*shape, dtype=dtype)
    if factor is not None:
        grad = grad / (factor * 100)  # larger by design: 1e-6 underflows in float16, so the factor is applied later
    level = None if factor is None else torch.tensor(factor, device=DEVICE)
    assert_near(kernels.gelu(hidden), reference.gelu(hidden.double()), dtype)
    expected = reference.gelu_backward(*exact(grad.clone(), hidden, level))
    assert_near(kernels.gelu_backward(grad.clone(), hidden, level), expected, dtype, dtype, torch.float32)


def test_error_of_gelu(kernels: Kernels) -> None:
    """GELU and its derivative are within 5e-7 of their float64 values, and correct for large numbers and NaN."""
    hidden = torch.linspace(-8, 8, 256 * 128, device=DEVICE).view(1, 1, 256, 128)
    expected = reference.gelu_backward(torch.ones_like(hidden, dtype=torch.float64), hidden.double(), None)
    derivative, activated, _ = kernels.gelu_backward(torch.ones_like(hidden), hidden, None)
    assert (derivative.double() - expected[0]).abs().max() < 5e-7
    for found in (activated, kernels.gelu(hidden)):
        assert (found.double() - expected[1]).abs().max() < 5e-7
    large = torch.tensor([[-1e20, -50.0, -0.0, 0.0, 50.0, 1e30, torch.nan]], device=DEVICE)[:, None, None]
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 50.0, 1e30, torch.nan], device=DEVICE)
    torch.testing.assert_close(kernels.gelu(large).flatten(), wanted, rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 3, 7, 130), (1, 17, 17, 8)])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("factor", [None, 1e-6])
def test_squared_relu_and_its_gradient(
    kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, factor: float | None
) -> None:
    """relu(x)^2, its gradient with a factor, the gradient's sum over rows, and the value again."""
    hidden, grad = draw(*shape, dtype=dtype) * 3, draw(*shape, dtype=dtype)
    level = None if factor is None else torch.tensor(factor, device=DEVICE)
    if factor is not None:
        grad = grad / (factor * 100)
    assert_near(kernels.squared_relu(hidden), reference.squared_relu(hidden.double()), dtype)
    expected = reference.squared_relu_backward(*exact(grad.clone(), hidden, level))
    assert_near(kernels.squared_relu_backward(grad.clone(), hidden, level), expected, dtype, dtype, torch.float32)
    leaf = hidden.double().requires_grad_()
    (own,) = torch.autograd.grad(leaf.relu().square(), leaf, grad.double() * (1 if factor is None else factor))
    torch.testing.assert_close(expected[0], own)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_TYPES)
def test_residual_and_its_gradient(kernels: Kernels, draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Layer scale (one of them zero) and drop path on a branch in the products' type, with statistics of the sum."""
    x, branch, scale = draw(*shape), draw(*shape, dtype=dtype), draw(shape[3])
    scale[0] = 0
    keep = keep_factors(shape[0]) if shape[0] > 1 else None
    found = kernels.residual(x, branch, scale, keep, EPS)
    assert_near(found, reference.residual(*exact(x, branch, scale, keep, EPS)), torch.float32, torch.float32)
    backward = kernels.residual_backward(x, keep, dtype)
    assert_near(backward, reference.residual_backward(*exact(x, keep, dtype)), dtype, torch.float32)


def test_the_same_input_gives_the_same_bits(kernels: Kernels, draw: Draw) -> None:
    """Sums are added in a fixed order, so repeated calls are bit-identical."""
    x, grad, scale = draw(2, 13, 11, 33), draw(2, 13, 11, 33), draw(33)
    arguments = (x, reference.statistics(x, EPS), scale, None, 3)
    first, second = (kernels.mix_backward(grad, *arguments) for _ in range(2))
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
    mixed, mixed_stats = kernels.mix(xs, all_stats, scale, all_keep, 3, EPS)
    expected = reference.mix(*exact(x, stats, scale, keep, 3, EPS))
    assert_near((mixed[-1:], mixed_stats[-1:]), expected, half, torch.float32)
    normed = kernels.normalize(xs, all_stats, scale, scale, half)[-1:]
    assert_near(normed, reference.normalize(*exact(x, stats, scale, scale, half)), half)
    summed, _ = kernels.residual(xs, grads, scale, all_keep, EPS)
    assert_near(summed[-1:], reference.residual(*exact(x, grad, scale, keep, EPS))[0], half)
    kept, _ = kernels.residual_backward(grads, all_keep, half)
    assert_near(kept[-1:], reference.residual_backward(*exact(grad, keep, half))[0], half)
    assert_near(kernels.gelu(xs)[-1:], reference.gelu(x.double()), half)
    found = kernels.gelu_backward(grads, xs, None)[0][-1:, -1, -1]
    assert_near(found, reference.gelu_backward(*exact(grad, x, None))[0][:, -1, -1], half)
