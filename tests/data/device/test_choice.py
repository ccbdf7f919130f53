"""Triton's transform of training images and its check; it runs in Triton's interpreter, in a process of its own."""

import math

import pytest
import torch
from torch import Tensor

from metaformer.data.device import choice
from metaformer.data.device.choice import find_fault
from metaformer.data.device.transform import ColourStatistics, transform_plainly
from metaformer.data.plan.plan import BatchPlan
from tests.triton_interpreter import needs_triton, run_interpreted

CPU = torch.device("cpu")


@needs_triton
def test_interpreted_transform_is_the_plain_one() -> None:
    """All of triton_kernel_cases.py."""
    run_interpreted("tests/data/device/triton_kernel_cases.py")


@pytest.mark.parametrize(
    ("error", "fault"),
    [(0.0, None), (0.01, "it differs from the plain one by 0.01 at 37 px"), (math.nan, "by nan at 37 px")],
)
def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch, error: float, fault: str | None) -> None:
    """One value that is off by a hundredth, or no number."""

    def off(images: Tensor, plan: BatchPlan, statistics: ColourStatistics) -> Tensor:
        found = transform_plainly(images, plan, statistics)
        found[-1, -1, -1, -1] += error
        return found

    monkeypatch.setattr(choice, "transform_by_triton", off)
    found = find_fault(CPU, 37)
    assert found is None if fault is None else found is not None and fault in found


def test_kernels_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compiler says, in one line."""

    def fail(*_: object) -> Tensor:
        raise OverflowError("no such instruction\nand more")

    monkeypatch.setattr(choice, "transform_by_triton", fail)
    assert find_fault(CPU, 37) == "they cannot run on this device (OverflowError: no such instruction)"
