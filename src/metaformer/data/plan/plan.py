"""Sample plan: the images of each batch and every random number drawn for them.

A plan has no state. The order of epoch e is a permutation drawn from (seed, e), and the draws of a view, one use of an
image (`views`), are a hash of (seed, e, view). Images, crops and augmentations are therefore the same for any number of
ranks, workers and accumulation steps and in every loader, and training can resume at any batch from two integers.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from metaformer.data.plan.augmentation import AugmentationConfig, Interpolation
from metaformer.data.plan.balance import ClassBalance
from metaformer.data.plan.draws import Float64, Int64, generator, sample_bits, uniforms
from metaformer.data.plan.geometry import Box, central_part, evaluation_resize, random_resized_crop
from metaformer.data.plan.randaugment import (
    DRAWS_PER_OPERATION,
    IMAGENET_COLOUR,
    Colour,
    RandAugmentDraws,
    draw_operations,
)
from metaformer.data.plan.views import views_at

TRIES = 10  # rectangles to try: after that a crop falls back to a centred one, and nothing is erased
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)
_MIX_STREAM = 2


class CropDraws(NamedTuple):
    """Random resized crop and flip of a batch; see `geometry.random_resized_crop`."""

    tries: Float64  # [B, TRIES, 2]
    position: Float64  # [B, 2]
    aspects: tuple[float, float]  # allowed by the fallback, the same for all images
    flip: NDArray[np.bool_]  # [B]
    bicubic: NDArray[np.bool_]  # [B], else bilinear


class MixDraws(NamedTuple):
    """Mixing of each of G groups; an image's partner is at its position in the reversed group."""

    keep: Float64  # [G] weight of the image's own pixels outside the box
    box: Int64  # [G, 4] top, left, bottom, right; filled with the partner's pixels (cutmix)
    label_keep: Float64  # [G] weight of the image's own label


class EraseDraws(NamedTuple):
    """Random erasing of K images of a batch."""

    rows: Int64  # [K] positions in the batch
    boxes: Int64  # [K, 4] top, left, bottom, right
    noise_keys: Int64  # [K] 32 random bits that seed the noise


@dataclass(frozen=True)
class BatchPlan:
    """One rank's batch: the loader uses `samples` to `randaugment`, and the device applies `mix` and `erase`."""

    samples: Int64  # [B]
    image_size: int
    resize_to: int  # short side before the centre crop, used if `crop` is None
    bicubic: bool = True  # filter of that resize; bilinear if False
    crop: CropDraws | None = None
    randaugment: RandAugmentDraws | None = None
    mix: MixDraws | None = None
    erase: EraseDraws | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def region(self, row: int, width: int, height: int) -> Box:
        """Return the region that is resized of the image at position `row`, which has this size in pixels."""
        if self.crop is None:
            return central_part(width, height) or Box(0, 0, width, height)
        return random_resized_crop(self.crop.tries[row], self.crop.position[row], self.crop.aspects, width, height)


class Plan(Protocol):
    """Interface of a rank's sample plan."""

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches that this rank reads in an epoch."""

    @property
    def rounds_per_epoch(self) -> int:
        """Number of batches of the rank that has the most."""

    @property
    def batch_size(self) -> int:
        """Number of images in this rank's largest batch."""

    def batch(self, epoch: int, position: int) -> BatchPlan:
        """Return the batch at a position in [0, batches_per_epoch) of an epoch."""

    def to_read(self, epoch: int, position: int) -> BatchPlan:
        """Return the same batch without the draws that only the device needs."""

    def to_transform(self, epoch: int, position: int) -> BatchPlan:
        """Return the same batch without the draws that only a loader needs."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Plan that covers every image exactly once over all ranks.

    Rank r reads images r, r + world_size, ...; its last batch may be smaller.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int
    image_size: int
    crop_pct: float
    bicubic: bool = True  # filter of the resize; bilinear if False

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


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Plan of shuffled, augmented batches.

    A global batch (one optimizer step) consists of `global_batch_size` consecutive images in the epoch's order. It is
    split into world_size * accumulation_steps equal batches, of which rank r reads number r, r + world_size, ...
    The last, incomplete global batch of an epoch is dropped or, with `fill_last_batch`, padded with the epoch's first
    images.

    With `augmentation.repeats` of R, as in timm's RepeatAugSampler, each image of the order is followed by its other
    R - 1 views, and the epoch ends after `num_samples` views. A global batch begins with the first view of each of its
    images, so that the views of an image go to different ranks.
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
    bicubic: bool = True  # filter of the resize without random crops; bilinear if False
    fill: Colour = IMAGENET_COLOUR  # RandAugment's fill for pixels outside an image
    balance: ClassBalance | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        padding = self.global_batch_size - 1 if self.fill_last_batch else 0
        return (self.num_samples + padding) // self.global_batch_size

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
        """Return a batch; the draws of a view depend only on seed, epoch and view."""
        reading, transforming = self.to_read(epoch, position), self.to_transform(epoch, position)
        return replace(reading, mix=transforming.mix, erase=transforming.erase)

    def to_read(self, epoch: int, position: int) -> BatchPlan:
        views, a = self._views(epoch, position), self.augmentation
        samples = views % self.num_samples
        crop = _draw_crop(a, uniforms(sample_bits(self.seed, epoch, views, CROP_WORDS))) if a.random_crop else None
        operations = None
        if a.randaugment.num_ops:
            shape = (a.randaugment.num_ops, DRAWS_PER_OPERATION)
            words = range(RANDAUGMENT_FIRST, RANDAUGMENT_FIRST + math.prod(shape))
            bits = sample_bits(self.seed, epoch, views, words)
            operations = draw_operations(a.randaugment, uniforms(bits).reshape(len(samples), *shape), self.fill)
        resize_to = evaluation_resize(self.image_size, self.crop_pct)
        return BatchPlan(samples, self.image_size, resize_to, self.bicubic, crop=crop, randaugment=operations)

    def to_transform(self, epoch: int, position: int) -> BatchPlan:
        views, a = self._views(epoch, position), self.augmentation
        samples = views % self.num_samples
        erase = None
        if a.erase_probability:
            bits = sample_bits(self.seed, epoch, views, ERASE_WORDS)
            erase = _draw_erase(a, self.image_size, uniforms(bits[:, :-1]), bits[:, -1:])
        mix = self._draw_mix(epoch, self._batch_number(position)) if a.mixes else None
        resize_to = evaluation_resize(self.image_size, self.crop_pct)
        return BatchPlan(samples, self.image_size, resize_to, self.bicubic, mix=mix, erase=erase)

    def _batch_number(self, position: int) -> int:
        """Return a batch's number among the epoch's batches of all ranks."""
        return position * self.world_size + self.rank

    def _views(self, epoch: int, position: int) -> Int64:
        slots = self._slots(position)
        return views_at(
            slots, seed=self.seed, epoch=epoch, num_samples=self.num_samples, repeats=self.augmentation.repeats,
            balance=self.balance,
        )  # fmt: skip

    def _slots(self, position: int) -> Int64:
        """Return the positions of a batch's views in the epoch; those of a global batch are sorted by view."""
        step, first = divmod(self._batch_number(position) * self.batch_size, self.global_batch_size)
        slots = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        slots %= self.num_samples  # only a padded last batch reaches beyond the end
        if self.augmentation.repeats > 1:
            slots = slots[np.argsort(slots % self.augmentation.repeats, kind="stable")]
        return slots[first : first + self.batch_size]

    def _draw_mix(self, epoch: int, batch_number: int) -> MixDraws:
        a = self.augmentation
        group_size = a.mix_group_size or self.batch_size
        groups = self.batch_size // group_size
        rows = [
            _draw_group_mix(a, self.image_size, generator(self.seed, epoch, _MIX_STREAM, batch_number * groups + g))
            for g in range(groups)
        ]
        keep, box, label_keep = zip(*rows, strict=True)
        return MixDraws(np.array(keep), np.array(box, np.int64), np.array(label_keep))


# Layout of a sample's random words: crop (area and aspect of each try, position, flip, filter), erasing (area and
# aspect of each try, whether to erase, position, noise key), RandAugment. A new augmentation must use the words after
# these, so that existing draws do not change.
CROP_WORDS = range(2 * TRIES + 4)
ERASE_WORDS = range(CROP_WORDS.stop, CROP_WORDS.stop + 2 * TRIES + 3 + 1)
RANDAUGMENT_FIRST = ERASE_WORDS.stop


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
    apply_u, left_u, top_u = u[:, 2 * TRIES :].T
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < size) & (widths < size)
    rows = np.flatnonzero((apply_u < a.erase_probability) & fits.any(axis=1))
    first = fits[rows].argmax(axis=1)
    height, width = heights[rows, first], widths[rows, first]
    top = np.floor(top_u[rows] * (size - height + 1))
    left = np.floor(left_u[rows] * (size - width + 1))
    boxes = np.stack([top, left, top + height, left + width], axis=1).astype(np.int64)
    return EraseDraws(rows, boxes, (key_bits[rows, 0] >> np.uint64(32)).astype(np.int64))


def _draw_group_mix(a: AugmentationConfig, size: int, rng: np.random.Generator) -> tuple[float, list[int], float]:
    """Draw mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) for one group: keep, box and label_keep."""
    empty_box = [0, 0, 0, 0]
    if rng.random() >= a.mix_probability:
        return 1.0, empty_box, 1.0
    both = a.mixup_alpha > 0 and a.cutmix_alpha > 0
    use_cutmix = rng.random() < a.cutmix_probability if both else a.cutmix_alpha > 0
    alpha = a.cutmix_alpha if use_cutmix else a.mixup_alpha
    keep = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return keep, empty_box, keep
    cut = int(size * (1 - keep) ** 0.5)
    y, x = rng.integers(size), rng.integers(size)
    box = [int(np.clip(v, 0, size)) for v in (y - cut // 2, x - cut // 2, y + cut // 2, x + cut // 2)]
    area = (box[2] - box[0]) * (box[3] - box[1])
    return 1.0, box, 1 - area / (size * size)  # the label weight follows the clipped box
