"""Copies to the device; those to a GPU need one."""

import pytest
import torch

from metaformer.data.device.transfer import to_device


def test_a_tensor_that_is_not_on_the_cpu_is_not_pinned() -> None:
    """Only memory of the CPU can be page-locked: a tensor that is elsewhere, as DALI's are, is passed on as it is."""
    elsewhere = torch.empty(2, device="meta")
    assert to_device(elsewhere, torch.device("meta")) is elsewhere
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)) as error:  # no GPU, or nothing to copy
        to_device(elsewhere, torch.device("cuda"))
    assert "pin" not in str(error.value)


def test_the_cpu_keeps_its_tensors() -> None:
    """On the CPU nothing is copied."""
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
