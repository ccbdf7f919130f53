"""Which way training images are transformed; Triton's runs in its interpreter, which needs a process of its own."""

import math

import pytest
import torch
from torch import Tensor

from metaformer.data import fused_transform
from metaformer.data.device_transform import ColourStatistics, transform_plainly
from metaformer.data.fused_transform import choose_transform, find_fault, transform_by_triton
from metaformer.data.plan import BatchPlan
from tests.triton_interpreter import needs_triton, run_interpreted

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@needs_triton
def test_interpreted_transform_is_the_plain_one() -> None:
    """All of triton_transform_cases.py."""
    run_interpreted("tests/data/triton_transform_cases.py")


def test_which_is_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Triton's on a GPU, for channels_last, where nothing is wrong with it; one warning where something is."""
    monkeypatch.setattr(fused_transform, "find_fault", lambda device: None)
    assert choose_transform(GPU, torch.channels_last) is transform_by_triton
    assert choose_transform(GPU, torch.contiguous_format) is transform_plainly
    assert choose_transform(CPU, torch.channels_last) is transform_plainly
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(fused_transform, "find_fault", lambda device: "they differ")
    assert choose_transform(GPU, torch.channels_last) is transform_plainly
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: Triton's kernels for mixing and erasing: they differ; going on without"


@pytest.mark.parametrize(
    ("error", "fault"),
    [(0.0, None), (0.01, "they differ from the plain way by 0.01 on this device"), (math.nan, "by nan on this device")],
)
def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch, error: float, fault: str | None) -> None:
    """One value that is off by a hundredth, or no number."""

    def off(images: Tensor, plan: BatchPlan, statistics: ColourStatistics) -> Tensor:
        found = transform_plainly(images, plan, statistics)
        found[-1, -1, -1, -1] += error
        return found

    monkeypatch.setattr(fused_transform, "transform_by_triton", off)
    found = find_fault(CPU)
    assert found is None if fault is None else found is not None and fault in found


def test_kernels_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compiler says, in one line."""

    def fail(*_: object) -> Tensor:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(fused_transform, "transform_by_triton", fail)
    assert find_fault(CPU) == "they cannot run on this device (RuntimeError: no such instruction)"
