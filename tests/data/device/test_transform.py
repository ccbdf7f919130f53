"""Tests of batched normalization, mixing and erasing on the device."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.data import mixup
from torch import Tensor
from torchvision.transforms.functional import normalize as torchvision_normalize

from metaformer.data.device.transform import (
    TrainingTransform,
    counter_normal,
    denormalize,
    erase,
    mix,
    mix_targets,
    normalize,
    smooth_one_hot,
)
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import EraseDraws, MixDraws, TrainingPlan

MIXUP = MixDraws(keep=np.array([0.3]), box=np.zeros((1, 4), np.int64), label_keep=np.array([0.3]))
CUTMIX = MixDraws(np.array([1.0]), np.array([[2, 3, 9, 16]]), np.array([1 - 7 * 13 / 16**2]))
ERASE = EraseDraws(np.array([1, 4]), np.array([[0, 2, 7, 16], [5, 5, 9, 6]]), np.array([12345, 2**32 - 1]))


@pytest.fixture
def images() -> Tensor:
    """Six uint8 channels_last images, as loaders provide them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return pixels.to(memory_format=torch.channels_last)


def mix_both(images: Tensor, targets: Tensor, draws: MixDraws) -> tuple[Tensor, Tensor]:
    return mix(images, draws), mix_targets(targets, draws)


def test_normalize_is_torchvisions(images: Tensor) -> None:
    """Normalized values are (x / 255 - mean) / std with ImageNet's statistics; the input is not modified."""
    before = images.clone()
    expected = torchvision_normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)


def test_denormalize_is_the_inverse(images: Tensor) -> None:
    """Denormalized images are the original pixels / 255; values outside a pixel's range are clipped."""
    torch.testing.assert_close(denormalize(normalize(images)), images / 255, rtol=0, atol=1e-6)
    extreme = denormalize(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert torch.equal(extreme[0], torch.zeros(3, 4, 4))
    assert torch.equal(extreme[1], torch.ones(3, 4, 4))


def test_smoothed_targets_are_the_papers() -> None:
    """With 1000 classes and smoothing .1 the label gets .9001 and the others .0001; without smoothing 1 and 0."""
    targets = smooth_one_hot(torch.tensor([3, 999]), 1000, 0.1)
    assert targets.shape == (2, 1000)
    assert targets[0, 3].item() == pytest.approx(0.9001)
    assert targets[1, 999].item() == pytest.approx(0.9001)
    assert targets[0, 4].item() == pytest.approx(0.0001)
    assert targets.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert smooth_one_hot(torch.tensor([1]), 3, 0.0).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("draws", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_mixing_is_timms(images: Tensor, draws: MixDraws, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and targets equal those of timm's Mixup in batch mode with the same lambda and box."""
    top, left, bottom, right = draws.box[0].tolist()
    cut = bottom > 0
    monkeypatch.setattr(mixup.Mixup, "_params_per_batch", lambda self: (0.5 if cut else draws.keep.item(), cut))
    monkeypatch.setattr(mixup, "rand_bbox", lambda *_, **__: (top, bottom, left, right))
    labels = torch.tensor([0, 1, 2, 2, 4, 9])
    expected = mixup.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(normalize(images), labels)
    result = mix_both(normalize(images), smooth_one_hot(labels, 10, 0.1), draws)
    for ours, timms in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result[1], mixup.mixup_target(labels, 10, draws.label_keep.item(), 0.1))


def test_cutmix_swaps_exactly_the_box(images: Tensor) -> None:
    """Pixels inside the box are exactly the partner's, and pixels outside it the image's own."""
    before = normalize(images)
    mixed = mix(before.clone(), CUTMIX)
    expected = before.clone()
    expected[..., 2:9, 3:16] = before.flip(0)[..., 2:9, 3:16]
    assert torch.equal(mixed, expected)


def test_groups_are_mixed_by_themselves(images: Tensor) -> None:
    """Mixing a batch of groups equals mixing each group alone."""
    targets = smooth_one_hot(torch.arange(6), 6, 0.1)
    both = [np.concatenate(pair) for pair in zip(MIXUP, CUTMIX, strict=True)]
    mixed = mix_both(normalize(images), targets, MixDraws(*both))
    first = mix_both(normalize(images[:3]), targets[:3], MIXUP)
    second = mix_both(normalize(images[3:]), targets[3:], CUTMIX)
    for whole, one, other in zip(mixed, first, second, strict=True):
        assert torch.equal(whole, torch.cat([one, other]))


def test_no_mixing_leaves_the_batch(images: Tensor) -> None:
    """A group without mixing keeps its images and targets exactly."""
    draws = MixDraws(np.ones(1), np.zeros((1, 4), np.int64), np.ones(1))
    targets = smooth_one_hot(torch.arange(6), 6, 0.1)
    mixed = mix_both(normalize(images), targets, draws)
    assert torch.equal(mixed[0], normalize(images))
    assert torch.equal(mixed[1], targets)


def test_only_the_boxes_are_erased(images: Tensor) -> None:
    """All channels of every pixel in the boxes change, and no other pixel of any image."""
    before = normalize(images)
    inside = torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    inside[1, :, 0:7, 2:16] = True
    inside[4, :, 5:9, 5:6] = True
    assert torch.equal(erase(before.clone(), ERASE) != before, inside.expand(-1, 3, -1, -1))


def test_noise_belongs_to_the_image_and_not_to_its_place(images: Tensor) -> None:
    """Equal keys erase an image in the same way at any position in a batch; another key gives other noise."""
    erased = erase(normalize(images), ERASE)
    alone = EraseDraws(np.array([0]), ERASE.boxes[:1], ERASE.noise_keys[:1])
    assert torch.equal(erase(normalize(images[1:2]), alone)[0], erased[1])
    other = erase(normalize(images[1:2]), alone._replace(noise_keys=np.array([12346])))[0]
    assert (other[:, :7, 2:] != erased[1, :, :7, 2:]).all()


def test_noise_is_standard_normal_and_independent() -> None:
    """Noise has mean 0, standard deviation 1 and normal quantiles; pixels, channels and near keys are uncorrelated."""
    noise = counter_normal(torch.tensor([7, 8, 2**31, 2**32 - 1, 0]), torch.Size((3, 128, 128)))
    assert noise.shape == (5, 3, 128, 128)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    bound = 4 / noise.numel() ** 0.5
    assert abs(noise.mean().item()) < bound
    assert noise.std().item() == pytest.approx(1, abs=bound)
    quantiles = torch.quantile(noise.flatten(), torch.tensor([0.00135, 0.1587, 0.5, 0.8413, 0.99865]))
    assert quantiles.tolist() == pytest.approx([-3, -1, 0, 1, 3], abs=0.06)
    neighbours = [noise, *(noise.roll(1, dims=dim) for dim in range(4))]
    correlations = torch.corrcoef(torch.stack([n.flatten() for n in neighbours])) - torch.eye(5)
    assert correlations.abs().max() < bound


def training_batch(images: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    augmentation = AugmentationConfig(erase_probability=1.0, **options)
    plan = TrainingPlan(
        num_samples=6,
        global_batch_size=6,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        image_size=16,
        crop_pct=0.9,
        augmentation=augmentation,
    ).batch(0, 0)
    return TrainingTransform(10, 0.1)(images, labels, plan)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_whole_transform_keeps_layout_and_types(images: Tensor, layout: torch.memory_format) -> None:
    """Images become float32 and keep their memory format; targets are float32 and each row sums to 1."""
    images = images.contiguous(memory_format=layout)
    out, targets = training_batch(images, torch.arange(6))
    assert out.shape == images.shape
    assert out.dtype == targets.dtype == torch.float32
    assert out.is_contiguous(memory_format=layout)
    assert targets.sum(1).tolist() == pytest.approx([1] * 6, abs=1e-5)


def test_whole_transform_erases_after_mixing(images: Tensor) -> None:
    """The transform normalizes, smooths, mixes and erases, in this order, with the plan's draws."""
    labels = torch.tensor([0, 1, 2, 2, 4, 9])
    plan = TrainingPlan(
        num_samples=6,
        global_batch_size=6,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        image_size=16,
        crop_pct=0.9,
        augmentation=AugmentationConfig(erase_probability=1.0),
    ).batch(0, 0)
    assert plan.mix is not None
    assert plan.erase is not None
    mixed, targets = mix_both(normalize(images), smooth_one_hot(labels, 10, 0.1), plan.mix)
    result = TrainingTransform(10, 0.1)(images, labels, plan)
    assert torch.equal(result[0], erase(mixed, plan.erase))
    assert torch.equal(result[1], targets)


@pytest.mark.parametrize("off", [{"mix_probability": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
def test_transform_without_mixing_smooths_only(images: Tensor, off: dict[str, float]) -> None:
    """Without mixing, the targets are the smoothed labels."""
    labels = torch.arange(6)
    assert torch.equal(training_batch(images, labels, **off)[1], smooth_one_hot(labels, 10, 0.1))


def test_empty_boxes_erase_nothing(images: Tensor) -> None:
    """A box without pixels does not change its image."""
    draws = EraseDraws(np.array([2]), np.array([[5, 5, 5, 9]]), np.array([1]))
    assert torch.equal(erase(normalize(images), draws), normalize(images))
