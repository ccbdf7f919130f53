"""Copies from the CPU to the device that the training works on."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, where it may be already; the CPU goes on at once, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # only copies from page-locked memory run beside the program
    return tensor.to(device, non_blocking=True)
