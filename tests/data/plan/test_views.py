"""Tests of class balance and repeated augmentation."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metaformer.data.index.config import Balance
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.balance import make_balance
from metaformer.data.plan.plan import TrainingPlan
from metaformer.data.plan.views import epoch_order, views_at

SIZES = {Balance.sqrt: (750, 250), Balance.uniform: (500, 500)}  # draws of classes of 900 and 100 images
LABELS = np.repeat([0, 2], [900, 100])  # class 1 has no images


def plan(num_samples: int, batch: int, repeats: int = 1, **options: Any) -> TrainingPlan:
    values: dict[str, Any] = {"accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": 7, "image_size": 32}
    augmentation = AugmentationConfig(repeats=repeats, mix_probability=0.0)
    values |= {"crop_pct": 0.9, "augmentation": augmentation, **options}
    return TrainingPlan(num_samples=num_samples, global_batch_size=batch, **values)


def samples(plan: TrainingPlan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.batch(epoch, position).samples for position in range(plan.batches_per_epoch)])


@pytest.mark.parametrize("balance", SIZES)
def test_classes_and_images_are_used_as_often_as_documented(balance: Balance) -> None:
    """Each class has its share of the draws, and each image that of its class, rounded down or up."""
    expected, totals = np.repeat(SIZES[balance], [900, 100]) / np.repeat([900, 100], [900, 100]), np.zeros(1000)
    epochs = 40
    for epoch in range(epochs):
        counts = np.bincount(samples(plan(1000, 100, balance=make_balance(balance, LABELS)), epoch), minlength=1000)
        assert counts.sum() == 1000
        assert abs(counts[:900].sum() - SIZES[balance][0]) <= 1
        assert (np.abs(counts - expected) < 1).all()
        totals += counts
    fraction = expected % 1
    spread = np.sqrt(epochs * fraction * (1 - fraction))
    assert (np.abs(totals - epochs * expected) <= 5 * spread + 1e-9).all(), "an image is preferred to another"


def test_equal_classes_are_used_as_without_balance() -> None:
    """With classes of equal size every image is used once."""
    equal = make_balance(Balance.uniform, np.repeat(np.arange(50), 20))
    assert sorted(samples(plan(1000, 100, balance=equal), 0)) == list(range(1000))


def test_every_image_has_its_turn() -> None:
    """Images that few epochs use are all used in the end, and the classes equally often."""
    labels = np.concatenate([np.zeros(5, np.int64), np.arange(1, 4)])
    balance = make_balance(Balance.uniform, labels)
    options: dict[str, Any] = {"seed": 0, "num_samples": 8, "repeats": 1, "balance": balance}
    found = np.concatenate([views_at(np.arange(8), epoch=epoch, **options) % 8 for epoch in range(50)])
    assert np.bincount(labels[found]) == pytest.approx([100] * 4)
    assert set(found) == set(range(8))


@pytest.mark.parametrize("balance", [Balance.none, Balance.sqrt, Balance.uniform])
@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_and_a_resume_see_one_sequence(balance: Balance, repeats: int) -> None:
    """For any ranks and accumulation, and from any position, the views and their crops are those of one rank."""
    whole = plan(1000, 96, repeats, balance=make_balance(balance, LABELS))
    for world_size, accumulation in ((2, 3), (8, 1), (3, 4)):
        ranks = [
            replace(whole, rank=rank, world_size=world_size, accumulation_steps=accumulation)
            for rank in range(world_size)
        ]
        for step in (9, 4):
            epoch_order.cache_clear()
            positions = range(step * accumulation, (step + 1) * accumulation)
            parts = [rank.batch(5, position) for position in positions for rank in ranks]
            expected = whole.batch(5, step)
            assert np.array_equal(np.concatenate([part.samples for part in parts]), expected.samples)
            tries = [part.crop.tries for part in parts if part.crop is not None]
            assert expected.crop is not None
            assert np.array_equal(np.concatenate(tries), expected.crop.tries)


def test_every_use_of_an_image_has_its_own_augmentation() -> None:
    """Crops of an image that an epoch uses several times differ, by balance, by repeats and by both."""
    for repeats, balance in ((1, Balance.uniform), (3, Balance.none), (2, Balance.uniform)):
        whole = plan(1000, 1000, repeats, balance=make_balance(balance, LABELS)).batch(0, 0)
        assert whole.crop is not None
        uses = {(sample, *tries) for sample, tries in zip(whole.samples, whole.crop.tries[:, 0].tolist(), strict=True)}
        assert len(np.unique(whole.samples)) < 700
        assert len(uses) == 1000


def test_repeats_are_in_the_same_batch() -> None:
    """As in timm, an epoch has N views of N / repeats images; a batch begins with one view of each of its images."""
    whole = plan(1000, 96, repeats=3)
    assert whole.steps_per_epoch == 1000 // 96
    for step in range(whole.steps_per_epoch):
        batch = whole.batch(0, step).samples.reshape(3, 32)
        assert len(np.unique(batch[0])) == 32
        assert (batch == batch[0]).all()
    assert np.array_equal(np.unique(samples(whole, 0)), np.sort(epoch_order(7, 0, 1000)[:320]))
    counts = np.bincount(samples(plan(1000, 100, repeats=3), 0))
    assert sorted(counts[counts > 0]) == [1] + [3] * 333, "a global batch that is no multiple of 3 splits an image"


def test_without_balance_and_repeats_views_are_images() -> None:
    """The defaults draw what they always drew."""
    views = views_at(np.arange(50), seed=3, epoch=1, num_samples=50, repeats=1, balance=None)
    assert np.array_equal(views, epoch_order(3, 1, 50))


def test_a_large_data_set_is_sampled_quickly() -> None:
    """Draws of 21,841 classes and 14 million images need little memory besides the permutation of the epoch."""
    labels = np.repeat(np.arange(21_841), 641)
    large = plan(len(labels), 4096, balance=make_balance(Balance.sqrt, labels))
    assert large.balance is not None
    assert sum(array.nbytes for array in vars(large.balance).values()) < 1e6
    assert len(large.batch(0, 3000)) == 4096
