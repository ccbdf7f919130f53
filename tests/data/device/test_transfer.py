"""Tests of copies to the device that do not need a GPU."""

import pytest
import torch

from metaformer.data.device.transfer import to_device


def test_a_tensor_that_is_not_on_the_cpu_is_not_pinned() -> None:
    """Only CPU memory can be page-locked, so a tensor on another device (such as DALI's) is returned as is."""
    elsewhere = torch.empty(2, device="meta")
    assert to_device(elsewhere, torch.device("meta")) is elsewhere
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)) as error:  # no GPU, or nothing to copy
        to_device(elsewhere, torch.device("cuda"))
    assert "pin" not in str(error.value)


def test_the_cpu_keeps_its_tensors() -> None:
    """Nothing is copied if the device is the CPU."""
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
