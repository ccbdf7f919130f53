"""The sample plan: which images make up each batch, and every random number of each image.

A plan has no state. The order of epoch e is a permutation drawn from (seed, e); a sample's draws are a hash of
(seed, e, sample). So images, crops and augmentations are the same for any number of ranks, workers and accumulation
steps, in every loader, and training resumes at any batch from two integers.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from metaformer.data.plan.augmentation import AugmentationConfig, Interpolation
from metaformer.data.plan.draws import Float64, Int64, generator, sample_bits, uniforms
from metaformer.data.plan.geometry import evaluation_resize
from metaformer.data.plan.randaugment import (
    DRAWS_PER_OPERATION,
    IMAGENET_COLOUR,
    Colour,
    RandAugmentDraws,
    draw_operations,
)

TRIES = 10  # rectangles tried before a fallback, for crops and for erasing
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
_ORDER_STREAM, _MIX_STREAM = 1, 2


class CropDraws(NamedTuple):
    """Random resized crop and flip of a batch; see `geometry.random_resized_crop`."""

    tries: Float64  # [B, TRIES, 2]
    position: Float64  # [B, 2]
    aspects: tuple[float, float]  # of the fallback, the same for all
    flip: NDArray[np.bool_]  # [B]
    bicubic: NDArray[np.bool_]  # [B], else bilinear


class MixDraws(NamedTuple):
    """Mixing of each group of G; partner of an image: the group reversed."""

    keep: Float64  # [G] share of the image that stays outside the box
    box: Int64  # [G, 4] top, left, bottom, right: inside it the partner's pixels (cutmix)
    label_keep: Float64  # [G] share of the image's own label


class EraseDraws(NamedTuple):
    """Random erasing of the images that get it, K of a batch."""

    rows: Int64  # [K] positions in the batch
    boxes: Int64  # [K, 4] top, left, bottom, right
    noise_keys: Int64  # [K] 32 random bits that the noise is made from


@dataclass(frozen=True)
class BatchPlan:
    """One rank's batch: what a loader must read (`samples` to `randaugment`), and what the device then does."""

    samples: Int64  # [B]
    image_size: int
    resize_to: int  # short side before the centre crop, where `crop` is None
    bicubic: bool = True  # filter of that resize, else bilinear
    crop: CropDraws | None = None
    randaugment: RandAugmentDraws | None = None
    mix: MixDraws | None = None
    erase: EraseDraws | None = None

    def __len__(self) -> int:
        return len(self.samples)


class Plan(Protocol):
    """What a loader is built from."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches that this rank reads in an epoch."""

    @property
    def rounds_per_epoch(self) -> int:
        """Batches of the rank that has the most."""

    @property
    def batch_size(self) -> int:
        """Images in this rank's largest batch."""

    def batch(self, epoch: int, position: int) -> BatchPlan:
        """The batch at a position in [0, batches_per_epoch) of an epoch."""

    def to_read(self, epoch: int, position: int) -> BatchPlan:
        """The same without what only the device needs."""

    def to_transform(self, epoch: int, position: int) -> BatchPlan:
        """The same without what only a loader needs."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Every image exactly once over all ranks: rank r reads images r, r + world_size, ...; the last batch is short."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    image_size: int
    crop_pct: float
    bicubic: bool = True  # filter of the resize, else bilinear

    @property
    def batches_per_epoch(self) -> int:
        own = len(range(self.rank, self.num_samples, self.world_size))
        return -(-own // self.batch_size)

    @property
    def rounds_per_epoch(self) -> int:
        return replace(self, rank=0).batches_per_epoch

    def batch(self, epoch: int, position: int) -> BatchPlan:
        own = np.arange(self.rank, self.num_samples, self.world_size, dtype=np.int64)
        samples = own[position * self.batch_size : (position + 1) * self.batch_size]
        return BatchPlan(samples, self.image_size, evaluation_resize(self.image_size, self.crop_pct), self.bicubic)

    to_read = to_transform = batch


@dataclass(frozen=True)
class TrainingPlan:
    """Shuffled, augmented batches.

    A global batch (one optimizer step) is a run of `global_batch_size` places in the epoch's order. It is cut into
    world_size * accumulation_steps equal batches, of which rank r reads those numbered r, r + world_size, ...
    An epoch's last incomplete global batch is left out or, with `fill_last_batch`, completed with the images that the
    epoch began with.
    """

    num_samples: int
    global_batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    image_size: int
    crop_pct: float
    augmentation: AugmentationConfig
    fill_last_batch: bool = False
    bicubic: bool = True  # filter of the resize where the augmentation does not crop at random, else bilinear
    fill: Colour = IMAGENET_COLOUR  # RandAugment's, for pixels from outside an image

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        filled = self.global_batch_size - 1 if self.fill_last_batch else 0
        return (self.num_samples + filled) // self.global_batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self.steps_per_epoch * self.accumulation_steps

    @property
    def rounds_per_epoch(self) -> int:
        return self.batches_per_epoch

    @property
    def batch_size(self) -> int:
        return self.global_batch_size // (self.world_size * self.accumulation_steps)

    def batch(self, epoch: int, position: int) -> BatchPlan:
        """As in `Plan`; the draws of a sample depend on seed, epoch and sample alone."""
        reading, transforming = self.to_read(epoch, position), self.to_transform(epoch, position)
        return replace(reading, mix=transforming.mix, erase=transforming.erase)

    def to_read(self, epoch: int, position: int) -> BatchPlan:
        samples, a = self._samples(epoch, position), self.augmentation
        crop = _draw_crop(a, uniforms(self._bits(epoch, samples, CROP_WORDS))) if a.random_crop else None
        operations = None
        if a.randaugment.num_ops:
            shape = (a.randaugment.num_ops, DRAWS_PER_OPERATION)
            words = range(RANDAUGMENT_FIRST, RANDAUGMENT_FIRST + math.prod(shape))
            bits = self._bits(epoch, samples, words)
            operations = draw_operations(a.randaugment, uniforms(bits).reshape(len(samples), *shape), self.fill)
        resize_to = evaluation_resize(self.image_size, self.crop_pct)
        return BatchPlan(samples, self.image_size, resize_to, self.bicubic, crop=crop, randaugment=operations)

    def to_transform(self, epoch: int, position: int) -> BatchPlan:
        samples, a = self._samples(epoch, position), self.augmentation
        erase = None
        if a.erase_probability:
            bits = self._bits(epoch, samples, ERASE_WORDS)
            erase = _draw_erase(a, self.image_size, uniforms(bits[:, :-1]), bits[:, -1:])
        mix = self._draw_mix(epoch, self._number(position)) if a.mixes else None
        resize_to = evaluation_resize(self.image_size, self.crop_pct)
        return BatchPlan(samples, self.image_size, resize_to, self.bicubic, mix=mix, erase=erase)

    def _number(self, position: int) -> int:
        """A batch's number among all ranks' batches of the epoch."""
        return position * self.world_size + self.rank

    def _samples(self, epoch: int, position: int) -> Int64:
        number = self._number(position)
        places = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        order = _epoch_order(self.seed, epoch, self.num_samples)
        return order.take(places, mode="wrap")  # beyond the end: a filled last batch

    def _bits(self, epoch: int, samples: Int64, words: range) -> NDArray[np.uint64]:
        return sample_bits(self.seed, epoch, samples, words)

    def _draw_mix(self, epoch: int, number: int) -> MixDraws:
        a = self.augmentation
        group_size = a.mix_group_size or self.batch_size
        groups = self.batch_size // group_size
        rows = [
            _draw_group_mix(a, self.image_size, generator(self.seed, epoch, _MIX_STREAM, number * groups + g))
            for g in range(groups)
        ]
        keep, box, label_keep = zip(*rows, strict=True)
        return MixDraws(np.array(keep), np.array(box, np.int64), np.array(label_keep))


# Which of a sample's random words are for what: crop (area and aspect of each try, position, flip, filter), erasing
# (area and aspect of each try, whether, position, the noise's key), RandAugment. An augmentation that comes later takes
# the words after these, so that all draws stay as they are.
CROP_WORDS = range(2 * TRIES + 4)
ERASE_WORDS = range(CROP_WORDS.stop, CROP_WORDS.stop + 2 * TRIES + 3 + 1)
RANDAUGMENT_FIRST = ERASE_WORDS.stop


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> Int64:
    return generator(seed, epoch, _ORDER_STREAM).permutation(num_samples)


def _log_uniform(u: Float64, low: float, high: float) -> Float64:
    result: Float64 = np.exp(np.log(low) + u * (np.log(high) - np.log(low)))
    return result


def _draw_crop(a: AugmentationConfig, u: Float64) -> CropDraws:
    area = a.min_area + u[:, :TRIES] * (a.max_area - a.min_area)
    aspect = _log_uniform(u[:, TRIES : 2 * TRIES], a.min_aspect, a.max_aspect)
    left, top, flip, filter_ = u[:, 2 * TRIES :].T
    bicubic_share = {Interpolation.random: 0.5, Interpolation.bicubic: 1.0, Interpolation.bilinear: 0.0}
    return CropDraws(
        tries=np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=-1),
        position=np.stack([left, top], axis=-1),
        aspects=(a.min_aspect, a.max_aspect),
        flip=flip < a.flip_probability,
        bicubic=filter_ < bicubic_share[a.interpolation],
    )


def _draw_erase(a: AugmentationConfig, size: int, u: Float64, key_bits: NDArray[np.uint64]) -> EraseDraws:
    area = size * size * (ERASE_AREA[0] + u[:, :TRIES] * (ERASE_AREA[1] - ERASE_AREA[0]))
    aspect = _log_uniform(u[:, TRIES : 2 * TRIES], *ERASE_ASPECT)
    whether, left_u, top_u = u[:, 2 * TRIES :].T
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size) & (widths < size)
    rows = np.flatnonzero((whether < a.erase_probability) & fits.any(axis=1))
    first = fits[rows].argmax(axis=1)
    height, width = heights[rows, first], widths[rows, first]
    top = np.floor(top_u[rows] * (size - height + 1))
    left = np.floor(left_u[rows] * (size - width + 1))
    boxes = np.stack([top, left, top + height, left + width], axis=1).astype(np.int64)
    return EraseDraws(rows, boxes, (key_bits[rows, 0] >> np.uint64(32)).astype(np.int64))


def _draw_group_mix(a: AugmentationConfig, size: int, rng: np.random.Generator) -> tuple[float, list[int], float]:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of one group: `MixDraws` of a single group."""
    nothing = [0, 0, 0, 0]
    if rng.random() >= a.mix_probability:
        return 1.0, nothing, 1.0
    both = a.mixup_alpha > 0 and a.cutmix_alpha > 0
    use_cutmix = rng.random() < a.cutmix_probability if both else a.cutmix_alpha > 0
    alpha = a.cutmix_alpha if use_cutmix else a.mixup_alpha
    keep = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return keep, nothing, keep
    cut = int(size * (1 - keep) ** 0.5)
    y, x = rng.integers(size), rng.integers(size)
    box = [int(np.clip(v, 0, size)) for v in (y - cut // 2, x - cut // 2, y + cut // 2, x + cut // 2)]
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 1.0, box, 1 - area / (size * size)  # the label's share follows the clipped box
