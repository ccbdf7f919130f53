"""Tests of the Triton transform and RandAugment and their checks, with Triton's interpreter in a separate process."""

import math

import pytest
import torch
from torch import Tensor

from metaformer.data.device import choice
from metaformer.data.device.choice import find_fault, find_randaugment_fault
from metaformer.data.device.randaugment import apply_to_batch
from metaformer.data.device.transform import ColourStatistics, transform_plainly
from metaformer.data.plan.plan import BatchPlan
from metaformer.data.plan.randaugment import RandAugmentDraws
from tests.triton_interpreter import needs_triton, run_interpreted

CPU = torch.device("cpu")


@needs_triton
def test_interpreted_transform_is_the_plain_one() -> None:
    """All tests of triton_kernel_cases.py pass in the interpreter."""
    run_interpreted("tests/data/device/triton_kernel_cases.py")


@needs_triton
def test_interpreted_randaugment_is_the_tensor_version() -> None:
    """All tests of triton_randaugment_cases.py pass in the interpreter."""
    run_interpreted("tests/data/device/triton_randaugment_cases.py")


@pytest.mark.parametrize(
    ("error", "fault"),
    [(0.0, None), (0.01, "it differs from the plain transform by 0.01 at 37 px"), (math.nan, "by nan at 37 px")],
)
def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch, error: float, fault: str | None) -> None:
    """A single value that is off by a hundredth or is NaN is found."""

    def transform_with_error(images: Tensor, plan: BatchPlan, statistics: ColourStatistics) -> Tensor:
        result = transform_plainly(images, plan, statistics)
        result[-1, -1, -1, -1] += error
        return result

    monkeypatch.setattr(choice, "transform_by_triton", transform_with_error)
    found = find_fault(CPU, 37)
    assert found is None if fault is None else found is not None and fault in found


def test_kernels_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the compiler is reported in one line."""

    def fail(*_: object) -> Tensor:
        raise OverflowError("no such instruction\nand more")

    monkeypatch.setattr(choice, "transform_by_triton", fail)
    assert find_fault(CPU, 37) == "they cannot run on this device (OverflowError: no such instruction)"


def test_a_wrong_value_of_randaugment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is off by one is found, and the fault names the image's operations."""

    def augment_with_error(images: Tensor, draws: RandAugmentDraws) -> Tensor:
        result = apply_to_batch(images, draws)
        result[-1, -1, -1, -1] ^= 1
        return result

    monkeypatch.setattr(choice, "augment_by_triton", apply_to_batch)
    assert find_randaugment_fault(CPU, 9) is None
    monkeypatch.setattr(choice, "augment_by_triton", augment_with_error)
    assert find_randaugment_fault(CPU, 9) == (
        "it differs from the plain RandAugment in 1 of 60 images at 9 px, such as TranslateYRel and TranslateYRel"
    )
