"""Transforms of a batch on the device: normalization, mixup and cutmix, random erasing, soft targets.

All transforms are batched and use the plan's draws; none of them synchronizes with the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from metaformer.data.device.transfer import to_device
from metaformer.data.plan.plan import BatchPlan, EraseDraws, MixDraws


class ColourStatistics(NamedTuple):
    """Mean and standard deviation with which a network's input is normalized, for RGB values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


ImageTransform = Callable[[Tensor, BatchPlan, ColourStatistics], Tensor]
IMAGENET = ColourStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@lru_cache
def mean_and_std(statistics: ColourStatistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, float32 [3, 1, 1] each, in units of [0, 255].

    The result is cached, because creating it on a GPU synchronizes.
    """
    mean, std = torch.tensor(statistics, device=device).mul(255).view(2, 3, 1, 1).unbind()
    return mean, std


def normalize(images: Tensor, statistics: ColourStatistics = IMAGENET) -> Tensor:
    """Normalize uint8 [B, 3, H, W] to float32 of the same shape and memory format: (x / 255 - mean) / std."""
    mean, std = mean_and_std(statistics, images.device)
    return images.float().sub_(mean).div_(std)


def denormalize(images: Tensor, statistics: ColourStatistics = IMAGENET) -> Tensor:
    """Invert `normalize`, to float32 in [0, 1]; the noise of random erasing is clipped."""
    mean, std = mean_and_std(statistics, images.device)
    return ((images * std + mean) / 255).clamp(0, 1)


def transform_plainly(images: Tensor, plan: BatchPlan, statistics: ColourStatistics) -> Tensor:
    """Normalize, mix and erase uint8 [B, 3, H, W] images with the plan's draws, one step at a time, to float32."""
    images = normalize(images, statistics)
    if plan.mix is not None:
        images = mix(images, plan.mix)
    if plan.erase is not None and len(plan.erase.rows):
        images = erase(images, plan.erase)
    return images


@dataclass(frozen=True)
class TrainingTransform:
    """Transform of a training batch to the inputs of the network and the loss."""

    num_classes: int
    label_smoothing: float
    statistics: ColourStatistics = IMAGENET
    transform_images: ImageTransform = transform_plainly

    def __call__(self, images: Tensor, labels: Tensor, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        """Transform images uint8 [B, 3, H, W] and labels int64 [B] to float32 images and targets [B, classes]."""
        targets = smooth_one_hot(labels, self.num_classes, self.label_smoothing)
        if plan.mix is not None:
            targets = mix_targets(targets, plan.mix)
        return self.transform_images(images, plan, self.statistics), targets


@dataclass(frozen=True)
class EvaluationTransform:
    """Transform of an evaluation batch: normalizes the images and keeps the labels."""

    statistics: ColourStatistics = IMAGENET

    def __call__(self, images: Tensor, labels: Tensor, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        """Transform images uint8 [B, 3, H, W] to float32."""
        return normalize(images, self.statistics), labels


def smooth_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Apply label smoothing (arXiv 1512.00567): every class gets smoothing / classes, and the label the rest."""
    off_value = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off_value, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off_value)


def mix_targets(targets: Tensor, draws: MixDraws) -> Tensor:
    """Mix each target with its partner's, as `mix` does with the images."""
    groups = len(draws.label_keep)
    share = as_tensor(targets, draws.label_keep).view(groups, 1, 1)
    grouped = targets.unflatten(0, (groups, -1))
    mixed: Tensor = grouped * share + grouped.flip(1) * (1 - share)
    return mixed.flatten(0, 1)


def mix(images: Tensor, draws: MixDraws) -> Tensor:
    """Apply mixup and cutmix: mix each group of the batch with the same group reversed."""
    groups = len(draws.keep)
    height, width = images.shape[-2:]
    keep = as_tensor(images, draws.keep).view(groups, 1, 1, 1, 1)
    inside = _boxes_to_mask(as_tensor(images, draws.box), height, width)[:, None]
    share = torch.where(inside, 0.0, keep)  # [G, 1, 1, H, W]
    grouped = images.unflatten(0, (groups, -1))
    mixed: Tensor = grouped * share + grouped.flip(1) * (1 - share)
    return mixed.flatten(0, 1)


def erase(images: Tensor, draws: EraseDraws) -> Tensor:
    """Apply random erasing (arXiv 1708.04896): fill each drawn box with per-pixel Normal(0, 1) noise, in place."""
    rows = as_tensor(images, draws.rows, torch.int64)
    inside = _boxes_to_mask(as_tensor(images, draws.boxes), *images.shape[-2:])
    noise = counter_normal(as_tensor(images, draws.noise_keys, torch.int64), images.shape[1:])
    return images.index_copy_(0, rows, torch.where(inside, noise, images.index_select(0, rows)))


def counter_normal(keys: Tensor, shape: torch.Size) -> Tensor:
    """Return Normal(0, 1) noise, float32 [K, *shape], from 32-bit keys int64 [K].

    Equal keys give equal noise on any device. Key and position go through a 32-bit integer hash (Chris Wellons'
    lowbias32), then through the Box-Muller transform.
    """
    positions = torch.arange(math.prod(shape), device=keys.device)
    state = _hash32(keys[:, None] ^ _hash32(positions))
    radius = (state + 1).to(torch.float32) * 2.0**-32  # (0, 1]
    angle = _hash32(state ^ 0x9E3779B9).to(torch.float32) * (2 * math.pi * 2.0**-32)
    return ((-2 * radius.log()).sqrt() * angle.cos()).view(-1, *shape)


def _hash32(x: Tensor) -> Tensor:
    """Return lowbias32 of 32-bit values stored as int64, whose products wrap."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _boxes_to_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Convert boxes [K, 4] (top, left, bottom, right) to bool [K, 1, H, W], true inside the box."""
    top, left, bottom, right = boxes[:, :, None, None, None].unbind(1)
    y = torch.arange(height, device=boxes.device)[:, None]
    x = torch.arange(width, device=boxes.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def as_tensor(like: Tensor, array: NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert draws of the plan to a tensor on the device of `like`, without waiting for the copy."""
    return to_device(torch.from_numpy(array).to(dtype), like.device)
