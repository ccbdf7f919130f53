"""Batches on the device, made from a loader's images."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metaformer.data.device.transfer import to_device
from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.loader import Loader
from metaformer.data.plan.plan import BatchPlan, Plan
from metaformer.interfaces import Batch

Transform = Callable[[Tensor, Tensor, BatchPlan], tuple[Tensor, Tensor]]


class Placement(NamedTuple):
    """Device and memory format of the batches' images."""

    device: torch.device
    memory_format: torch.memory_format


class Feed:
    """The batches of a plan, read by a loader and transformed on the device."""

    def __init__(self, index: ImageIndex, plan: Plan, loader: Loader, transform: Transform, target: Placement) -> None:
        self._index, self._plan, self._loader = index, plan, loader
        self._transform, self._device, self._memory_format = transform, target.device, target.memory_format

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from position `first` on."""
        loaded = self._loader.epoch(epoch, first)
        for position in range(first, self._plan.batches_per_epoch):
            pixels = next(loaded)
            plan = self._plan.to_transform(epoch, position)
            labels = torch.from_numpy(self._index.labels[plan.samples])
            started = time.perf_counter()
            pixels, labels = to_device(pixels, self._device), to_device(labels, self._device)
            copied = time.perf_counter() - started
            waited = self._loader.waited
            waited = waited._replace(copy=waited.copy + copied)
            images, targets = self._transform(pixels, labels, plan)
            yield Batch(images.contiguous(memory_format=self._memory_format), targets, waited)

    @property
    def rounds_per_epoch(self) -> int:
        """Number of batches of the rank that has the most."""
        return self._plan.rounds_per_epoch

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()
