"""Asynchronous copies from the CPU to the training device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device, without waiting for the copy; a tensor already there is returned as is."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # only copies from page-locked memory are asynchronous
    return tensor.to(device, non_blocking=True)
