"""Tests of mixup and cutmix: equality with timm for the same draws, and the distribution of the draws."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup
from timm.data.mixup import FastCollateMixup
from torch import Tensor

from metaformer.data.device.transform import mix, mix_targets, normalize, smooth_one_hot
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.draws import generator
from metaformer.data.plan.plan import _MIX_STREAM, MixDraws, TrainingPlan
from tests.parity.conftest import Box, papers_mixup

CLASSES, SEED, EPOCH = 1000, 11, 4
LEAST_P = 1e-3  # of the statistical tests; the draws are fixed


def drawn(position: int, size: int, batch: int) -> MixDraws:
    """Return the plan's mixing of one batch."""
    plan = TrainingPlan(
        num_samples=100 * batch,
        global_batch_size=batch,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=SEED,
        image_size=size,
        crop_pct=0.9,
        augmentation=AugmentationConfig(),
    )
    draws = plan.batch(EPOCH, position).mix
    assert draws is not None
    return draws


def random_batch(position: int, size: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 [B, 3, S, S] and labels int64 [B]."""
    rng = torch.Generator().manual_seed(position)
    pixels = torch.randint(0, 256, (batch, 3, size, size), generator=rng, dtype=torch.uint8)
    return pixels, torch.randint(0, CLASSES, (batch,), generator=rng)


@pytest.mark.parametrize(("size", "classes"), [(32, 1000), (45, 10)])
def test_batches_are_timms(size: int, classes: int) -> None:
    """For 100 batches, timm's Mixup with the plan's generator gives the images and targets of the plan's draws.

    Cutmix copies pixels exactly; mixup and targets differ by float32 rounding.
    """
    kinds = []
    for position in range(100):
        pixels, labels = random_batch(position, size)
        labels %= classes
        draws = drawn(position, size, len(labels))
        images, targets = mix(normalize(pixels), draws), mix_targets(smooth_one_hot(labels, classes, 0.1), draws)
        with papers_mixup(generator(SEED, EPOCH, _MIX_STREAM, position), classes) as timms:
            expected, expected_targets = timms(normalize(pixels), labels)
        is_cutmix = draws.keep.item() == 1
        kinds.append(is_cutmix)
        torch.testing.assert_close(images, expected, rtol=0, atol=0 if is_cutmix else 1e-6)
        torch.testing.assert_close(targets, expected_targets, rtol=0, atol=1e-6)
    assert 30 < sum(kinds) < 70


def test_batches_are_those_of_timms_collate_function() -> None:
    """timm's training code mixes uint8 images when collating and rounds, so images differ by at most half a level."""
    half_a_level = 0.5 / 255 / torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1) + 1e-5
    rounded = 0
    for position in range(40):
        pixels, labels = random_batch(position, 32)
        draws = drawn(position, 32, len(labels))
        images, targets = mix(normalize(pixels), draws), mix_targets(smooth_one_hot(labels, CLASSES, 0.1), draws)
        samples = list(zip(pixels.numpy(), labels.tolist(), strict=True))
        with papers_mixup(generator(SEED, EPOCH, _MIX_STREAM, position), CLASSES, FastCollateMixup) as timms:
            collated, expected_targets = timms(samples)
        difference = (images - normalize(collated)).abs()
        assert (difference <= half_a_level).all()
        torch.testing.assert_close(targets, expected_targets, rtol=0, atol=1e-6)
        if draws.keep.item() == 1:
            assert not difference.any()
        rounded += bool((difference > 0.4 * half_a_level).any())
    assert rounded > 10, "if this fails, timm no longer rounds: compare the images without this tolerance"


def test_todays_timm_gives_an_odd_cuts_last_pixel_to_the_far_side() -> None:
    """The one intended difference from timm 1.0.31: its boxes of odd size extend one pixel further down and right."""
    todays_box, size, longer = mixup.rand_bbox, 45, 0
    for position in range(100):
        found: list[tuple[Box, float]] = []

        def recorded(
            shape: tuple[int, ...], keep: float, count: None = None, found: list[tuple[Box, float]] = found
        ) -> Box:
            box: Box = todays_box(shape, keep, count=count)
            found.append((box, keep))
            return box

        pixels, labels = random_batch(position, size)
        with papers_mixup(generator(SEED, EPOCH, _MIX_STREAM, position), CLASSES, draw_box=recorded) as timms:
            timms(normalize(pixels), labels)
        for (top, bottom, left, right), keep in found:
            odd = int(size * (1 - keep) ** 0.5) % 2
            ours = drawn(position, size, len(labels)).box[0].tolist()
            assert [top, left] == ours[:2]
            assert [bottom, right] == [min(size, ours[2] + odd), min(size, ours[3] + odd)]
            longer += [bottom, right] != ours[2:]
    assert longer > 10


class Drawn(NamedTuple):
    """The raw numbers of many batches, in timm's order: cutmix or mixup, share kept, row and column of the centre."""

    is_cutmix: np.ndarray
    keep: np.ndarray
    row: np.ndarray
    column: np.ndarray


GROUPS, SIZE = 6000, 224


@pytest.fixture(scope="module")
def raw() -> Drawn:
    """The numbers that each group's generator draws."""
    rows = []
    for position in range(GROUPS):
        rng = generator(SEED, EPOCH, _MIX_STREAM, position)
        rng.random()  # whether to mix at all, which is always true here
        is_cutmix = rng.random() < 0.5
        alpha = 1.0 if is_cutmix else 0.8
        rows.append((is_cutmix, rng.beta(alpha, alpha), rng.integers(SIZE), rng.integers(SIZE)))
    return Drawn(*(np.array(column) for column in zip(*rows, strict=True)))


@pytest.fixture(scope="module")
def draws() -> MixDraws:
    """The plan's draws for the same groups."""
    augmentation = AugmentationConfig(mix_group_size=2)
    plan = TrainingPlan(
        num_samples=2 * GROUPS,
        global_batch_size=2 * GROUPS,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=SEED,
        image_size=SIZE,
        crop_pct=0.9,
        augmentation=augmentation,
    ).batch(EPOCH, 0)
    assert plan.mix is not None
    return plan.mix


def test_half_of_the_batches_get_cutmix(raw: Drawn, draws: MixDraws) -> None:
    """Cutmix and mixup are equally likely, independently of the previous group."""
    is_cutmix = draws.keep == 1
    assert np.array_equal(is_cutmix, raw.is_cutmix)
    assert stats.binomtest(int(is_cutmix.sum()), GROUPS, 0.5).pvalue > LEAST_P
    changes = int((is_cutmix[1:] != is_cutmix[:-1]).sum())
    assert stats.binomtest(changes, GROUPS - 1, 0.5).pvalue > LEAST_P


def test_shares_follow_their_beta_distributions(raw: Drawn, draws: MixDraws) -> None:
    """Mixup's share is Beta(.8, .8), not uniform; cutmix's share, before the box is clipped, is Beta(1, 1)."""
    mixup_share = draws.keep[~raw.is_cutmix]
    assert np.array_equal(mixup_share, raw.keep[~raw.is_cutmix])
    assert np.array_equal(mixup_share, draws.label_keep[~raw.is_cutmix])
    assert stats.kstest(mixup_share, stats.beta(0.8, 0.8).cdf).pvalue > LEAST_P
    assert stats.kstest(mixup_share, stats.uniform.cdf).pvalue < LEAST_P, "enough draws to tell them apart"
    assert stats.kstest(raw.keep[raw.is_cutmix], stats.beta(1, 1).cdf).pvalue > LEAST_P


def test_centres_are_uniform(raw: Drawn) -> None:
    """A box's centre is uniform over the image; its row, its column and the box's size are independent."""
    rows, columns = raw.row[raw.is_cutmix], raw.column[raw.is_cutmix]
    for places in (rows, columns):
        assert (places.min(), places.max()) == (0, SIZE - 1)
        assert stats.chisquare(np.bincount(places // 8, minlength=SIZE // 8)).pvalue > LEAST_P
        assert stats.spearmanr(places, raw.keep[raw.is_cutmix]).pvalue > LEAST_P
    assert stats.spearmanr(rows, columns).pvalue > LEAST_P


def test_boxes_and_labels_follow_the_raw_numbers(raw: Drawn, draws: MixDraws) -> None:
    """Each box follows from its centre and size clipped to the image; the label weight is the area outside it."""
    cut = raw.is_cutmix
    half = (SIZE * np.sqrt(1 - raw.keep[cut])).astype(int) // 2
    centre = np.stack([raw.row[cut], raw.column[cut]], axis=1)
    expected = np.hstack([centre - half[:, None], centre + half[:, None]]).clip(0, SIZE)
    assert np.array_equal(draws.box[cut], expected)
    area = (expected[:, 2] - expected[:, 0]) * (expected[:, 3] - expected[:, 1])
    np.testing.assert_allclose(draws.label_keep[cut], 1 - area / SIZE**2, rtol=0, atol=1e-15)
    clipped = area < (2 * half) ** 2
    assert 0.4 < clipped.mean() < 0.9
    assert (draws.label_keep[cut][clipped] > raw.keep[cut][clipped]).all()


def test_label_shares_are_distributed_as_timms(draws: MixDraws) -> None:
    """Label weights of both kinds pass a two-sample Kolmogorov-Smirnov test against timm's Mixup."""
    rng = np.random.default_rng(5)
    target, images = torch.tensor([0, 1]), torch.zeros(2, 1, SIZE, SIZE)
    with papers_mixup(rng, 2) as timms:
        timms.label_smoothing = 0.0
        theirs = np.array([timms(images, target)[1][0, 0].item() for _ in range(GROUPS // 2)])
    assert stats.ks_2samp(draws.label_keep, theirs).pvalue > LEAST_P
