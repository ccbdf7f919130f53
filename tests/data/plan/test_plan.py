"""Tests of the sample plan: the images of each batch and their draws."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaformer.data.plan.augmentation import AugmentationConfig, Interpolation, RandAugmentConfig
from metaformer.data.plan.plan import BatchPlan, EvaluationPlan, TrainingPlan
from metaformer.data.plan.views import epoch_order

few_examples = settings(max_examples=25, deadline=None, derandomize=True)
MANY = 20_000


def training_plan(num_samples: int, global_batch_size: int, **options: Any) -> TrainingPlan:
    values: dict[str, Any] = {
        "accumulation_steps": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 7,
        "image_size": 224,
        "crop_pct": 0.9,
    }
    values |= {"augmentation": AugmentationConfig(), **options}
    return TrainingPlan(num_samples=num_samples, global_batch_size=global_batch_size, **values)


class Cut(NamedTuple):
    """A way to split global batches, and a data set size."""

    world_size: int
    accumulation_steps: int
    groups: int  # mixing groups per batch
    group_size: int
    num_samples: int

    @property
    def whole(self) -> TrainingPlan:
        """The plan for one rank without accumulation."""
        size = self.world_size * self.accumulation_steps * self.groups * self.group_size
        return training_plan(
            self.num_samples + size, size, augmentation=AugmentationConfig(mix_group_size=self.group_size)
        )

    @property
    def ranks(self) -> list[TrainingPlan]:
        return [
            replace(self.whole, rank=r, world_size=self.world_size, accumulation_steps=self.accumulation_steps)
            for r in range(self.world_size)
        ]

    def global_batch(self, epoch: int, step: int) -> list[BatchPlan]:
        """Return all ranks' batches of a global batch, in the order of the epoch."""
        micro_batches = range(step * self.accumulation_steps, (step + 1) * self.accumulation_steps)
        return [rank.batch(epoch, position) for position in micro_batches for rank in self.ranks]


cuts = st.builds(Cut, *[st.integers(1, 4)] * 3, st.sampled_from([2, 4]), st.integers(0, 150))


def draws_by_sample(batches: list[BatchPlan]) -> dict[int, tuple[Any, ...]]:
    """Return all draws of each sample that do not depend on its batch."""
    result: dict[int, tuple[Any, ...]] = {}
    for batch in batches:
        assert batch.crop is not None
        assert batch.randaugment is not None
        assert batch.erase is not None
        crop = batch.crop
        erased = {
            row: (*box, key)
            for row, box, key in zip(
                batch.erase.rows.tolist(), batch.erase.boxes.tolist(), batch.erase.noise_keys.tolist(), strict=True
            )
        }
        for row, sample in enumerate(batch.samples.tolist()):
            crop_draws = (crop.tries[row].tolist(), crop.position[row].tolist(), crop.flip[row], crop.bicubic[row])
            result[sample] = (*crop_draws, [a[row].tolist() for a in batch.randaugment[:4]], erased.get(row))
    return result


def random_parts(batch: BatchPlan) -> list[Any]:
    return [part for part in (batch.crop, batch.randaugment, batch.mix, batch.erase) if part is not None]


@few_examples
@given(cut=cuts, epoch=st.integers(0, 400))
def test_global_batches_are_slices_of_one_order(cut: Cut, epoch: int) -> None:
    """For any ranks and accumulation, a step's batches are equal parts of the same slice of the epoch's order."""
    whole = cut.whole
    for rank in cut.ranks:
        assert rank.batches_per_epoch == whole.steps_per_epoch * cut.accumulation_steps
    for step in range(whole.steps_per_epoch):
        parts = [batch.samples for batch in cut.global_batch(epoch, step)]
        assert {len(part) for part in parts} == {cut.ranks[0].batch_size}
        assert np.array_equal(np.concatenate(parts), whole.batch(epoch, step).samples)


@few_examples
@given(cut=cuts, epoch=st.integers(0, 400))
def test_samples_are_seen_at_most_once_and_all_but_the_remainder(cut: Cut, epoch: int) -> None:
    """No image occurs twice in an epoch, and fewer images than a global batch are left out."""
    size = cut.whole.num_samples
    seen = np.concatenate(
        [batch.samples for s in range(cut.whole.steps_per_epoch) for batch in cut.global_batch(epoch, s)]
    )
    assert len(np.unique(seen)) == len(seen)
    assert set(seen.tolist()) <= set(range(size))
    assert 0 <= size - len(seen) < cut.whole.global_batch_size


@few_examples
@given(cut=cuts, epoch=st.integers(0, 400))
def test_a_filled_last_batch_leaves_no_image_out(cut: Cut, epoch: int) -> None:
    """With `fill_last_batch` every image occurs, and the epoch's first images pad its last global batch."""
    plans = [replace(rank, fill_last_batch=True) for rank in cut.ranks]
    steps, size = plans[0].steps_per_epoch, cut.whole.num_samples
    assert steps == -(-size // cut.whole.global_batch_size)
    positions = range(steps * cut.accumulation_steps)
    seen = np.concatenate([plan.batch(epoch, position).samples for position in positions for plan in plans])
    assert len(np.unique(seen)) == size
    assert seen[size:].tolist() == seen[: len(seen) - size].tolist()


@pytest.mark.parametrize("world_size", [2, 8, 1024])
def test_a_thousand_ranks_read_one_order(world_size: int) -> None:
    """At ImageNet's size, 2 to 1,024 ranks read and augment a step's 4,096 images as one rank does."""
    one = TrainingPlan(
        num_samples=1_281_167,
        global_batch_size=4096,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=7,
        image_size=224,
        crop_pct=0.9,
        augmentation=AugmentationConfig(mix_group_size=4),
    )
    expected = one.batch(3, 300)
    parts = [replace(one, rank=rank, world_size=world_size).batch(3, 300) for rank in range(world_size)]
    assert np.array_equal(np.concatenate([part.samples for part in parts]), expected.samples)
    assert draws_by_sample(parts) == draws_by_sample([expected])


@few_examples
@given(
    world_size=st.integers(1, 1024), accumulation_steps=st.integers(1, 4), batch_size=st.integers(1, 4), data=st.data()
)
def test_any_batch_of_any_world_is_a_slice(
    world_size: int, accumulation_steps: int, batch_size: int, data: st.DataObject
) -> None:
    """For 1 to 1,024 ranks, any batch of any rank is its slice of the single-rank batch, with the same draws."""
    size = world_size * accumulation_steps * batch_size
    one = training_plan(
        data.draw(st.integers(size, 3 * size)), size, augmentation=AugmentationConfig(mix_probability=0.0)
    )
    rank, epoch = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, 400))
    plan = replace(one, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps)
    position = data.draw(st.integers(0, plan.batches_per_epoch - 1))
    step, micro_batch = divmod(position, accumulation_steps)
    first = (micro_batch * world_size + rank) * batch_size
    part, whole = plan.batch(epoch, position), one.batch(epoch, step)
    assert np.array_equal(part.samples, whole.samples[first : first + batch_size])
    for mine, all_ in ((part.crop, whole.crop), (part.randaugment, whole.randaugment)):
        assert mine is not None
        assert all_ is not None
        for name in set(mine._fields) - {"aspects", "fill"}:
            assert np.array_equal(getattr(mine, name), getattr(all_, name)[first : first + batch_size]), name


@few_examples
@given(cut=cuts, epoch=st.integers(0, 400), data=st.data())
def test_a_resumed_epoch_is_the_rest(cut: Cut, epoch: int, data: st.DataObject) -> None:
    """From any position, a new plan gives the remaining batches of the epoch with the same draws."""
    plan = cut.ranks[-1]
    whole = [plan.batch(epoch, position) for position in range(plan.batches_per_epoch)]
    plan.batch(epoch + 1, 0)
    first = data.draw(st.integers(0, len(whole)))
    epoch_order.cache_clear()
    for position in range(first, len(whole)):
        expected, batch = whole[position], replace(plan).batch(epoch, position)
        assert np.array_equal(batch.samples, expected.samples)
        assert draws_by_sample([batch]) == draws_by_sample([expected])
        for part, expected_part in zip(batch.mix or (), expected.mix or (), strict=True):
            assert np.array_equal(part, expected_part)


@few_examples
@given(cut=cuts, epoch=st.integers(0, 400))
def test_a_samples_draws_are_the_same_for_any_ranks_and_accumulation(cut: Cut, epoch: int) -> None:
    """Crop, flip, filter, RandAugment and erasing of each sample do not depend on how the global batch is split."""
    assert draws_by_sample(cut.global_batch(epoch, 0)) == draws_by_sample([cut.whole.batch(epoch, 0)])


@few_examples
@given(cut=cuts, epoch=st.integers(0, 400))
def test_mixing_is_the_same_for_any_ranks_where_the_group_size_is_fixed(cut: Cut, epoch: int) -> None:
    """With mix_group_size, the groups of a global batch and their draws do not depend on how it is split."""
    last = cut.whole.steps_per_epoch - 1
    expected = cut.whole.batch(epoch, last).mix
    assert expected is not None
    parts = [batch.mix for batch in cut.global_batch(epoch, last)]
    for name, whole in zip(expected._fields, expected, strict=True):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), whole), name
    assert len(expected.keep) * cut.group_size == cut.whole.global_batch_size


def test_by_default_each_ranks_batch_is_mixed_by_itself() -> None:
    """Without mix_group_size each batch is one group, and batches of other ranks, steps and epochs mix differently."""
    plans = [training_plan(64, 16, rank=r, world_size=2, accumulation_steps=2) for r in range(2)]
    mixes = [plan.batch(epoch, position).mix for plan in plans for epoch in range(2) for position in range(8)]
    assert {len(mix.keep) for mix in mixes if mix} == {1}
    assert len({(mix.label_keep.item(), *mix.box[0].tolist()) for mix in mixes if mix}) == 32


@pytest.mark.parametrize("num_samples", [403, 257, 5, 3])
@pytest.mark.parametrize("world_size", range(1, 6))
def test_evaluation_covers_each_image_exactly_once(num_samples: int, world_size: int) -> None:
    """All ranks' batches together contain every image once, even with fewer images than ranks."""
    plans = [
        EvaluationPlan(
            num_samples=num_samples, batch_size=32, rank=rank, world_size=world_size, image_size=224, crop_pct=0.9
        )
        for rank in range(world_size)
    ]
    batches = [plan.batch(0, position) for plan in plans for position in range(plan.batches_per_epoch)]
    assert sorted(np.concatenate([batch.samples for batch in batches]).tolist()) == list(range(num_samples))
    assert all(0 < len(batch) <= 32 for batch in batches)
    assert all(random_parts(batch) == [] for batch in batches)


@pytest.mark.parametrize(("crop_pct", "resize_to"), [(0.9, 248), (0.95, 235), (1.0, 224)])
def test_evaluation_resizes_as_the_paper(crop_pct: float, resize_to: int) -> None:
    """The short side before the crop is that of the paper: 248 at .9, 235 at .95."""
    assert (
        EvaluationPlan(num_samples=1, batch_size=1, rank=0, world_size=1, image_size=224, crop_pct=crop_pct)
        .batch(0, 0)
        .resize_to
        == resize_to
    )


def test_epochs_and_seeds_differ() -> None:
    """Order and draws differ between epochs and seeds, and are reproducible."""
    plans = [(training_plan(64, 64, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    batches = [plan.batch(epoch, 0) for plan, epoch in plans]
    assert len({tuple(batch.samples.tolist()) for batch in batches}) == 4
    assert len({str(draws_by_sample([batch])[0]) for batch in batches}) == 4
    again = training_plan(64, 64, seed=0).batch(0, 0)
    assert draws_by_sample([again]) == draws_by_sample([batches[0]])


def test_orders_of_epochs_are_unrelated() -> None:
    """An image's positions in two epochs do not correlate with each other or with its position in the data set."""
    first, second = (
        np.argsort(training_plan(MANY, MANY, augmentation=no_augmentation()).batch(e, 0).samples) for e in (0, 1)
    )
    for one, other in ((first, second), (first, np.arange(MANY)), (second, np.arange(MANY))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / MANY**0.5


def no_augmentation() -> AugmentationConfig:
    return AugmentationConfig(
        random_crop=False,
        randaugment=RandAugmentConfig(num_ops=0),
        mix_probability=0.0,
        erase_probability=0.0,
    )


def test_augmentations_that_are_off_draw_nothing() -> None:
    """Turning an augmentation off omits its draws and does not change the other draws."""
    full = draws_by_sample([training_plan(8, 8).batch(0, 0)])
    batch = training_plan(8, 8, augmentation=no_augmentation()).batch(0, 0)
    assert random_parts(batch) == []
    fewer = AugmentationConfig(randaugment=RandAugmentConfig(num_ops=1), mix_probability=0.0)
    without_mixing = training_plan(8, 8, augmentation=fewer).batch(0, 0)
    assert without_mixing.mix is None
    for sample, draws in draws_by_sample([without_mixing]).items():
        assert draws[:4] == full[sample][:4]
        assert draws[5] == full[sample][5]


@cache
def many() -> BatchPlan:
    """The draws of 20,000 images, mixed in pairs."""
    return training_plan(MANY, MANY, augmentation=AugmentationConfig(mix_group_size=2)).batch(0, 0)


def close_to_share(probability: float) -> Any:
    return pytest.approx(probability, abs=4 * (probability * (1 - probability) / MANY) ** 0.5)


def uniform(values: np.ndarray, low: float, high: float) -> bool:
    """Return whether values pass the Kolmogorov-Smirnov test at about 5e-5."""
    u = np.sort((values.ravel() - low) / (high - low))
    grid = (np.arange(u.size) + 0.5) / u.size
    return bool(np.abs(u - grid).max() < 2.3 / u.size**0.5 + 0.5 / u.size)


def test_crops_are_drawn_as_in_the_recipe() -> None:
    """Tried areas are uniform in .08 to 1 of the image, aspects log-uniform in 3/4 to 4/3, positions uniform."""
    crop = many().crop
    assert crop is not None
    width, height = crop.tries[..., 0], crop.tries[..., 1]
    assert uniform(width * height, 0.08, 1)
    assert uniform(np.log(width / height), np.log(3 / 4), np.log(4 / 3))
    assert abs(np.corrcoef((width * height).ravel(), (width / height).ravel())[0, 1]) < 4 / crop.tries.size**0.5
    assert uniform(crop.position[:, 0], 0, 1)
    assert uniform(crop.position[:, 1], 0, 1)
    assert crop.aspects == (3 / 4, 4 / 3)
    assert crop.flip.mean() == close_to_share(0.5)
    assert crop.bicubic.mean() == close_to_share(0.5)


@pytest.mark.parametrize(("interpolation", "bicubic"), [(Interpolation.bicubic, True), (Interpolation.bilinear, False)])
def test_a_fixed_filter_and_flip_are_for_all(interpolation: Interpolation, bicubic: bool) -> None:
    """A fixed interpolation applies to every image; flip probabilities 0 and 1 mean never and always."""
    for flip in (0.0, 1.0):
        augmentation = AugmentationConfig(interpolation=interpolation, flip_probability=flip)
        crop = training_plan(500, 500, augmentation=augmentation).batch(0, 0).crop
        assert crop is not None
        assert (crop.bicubic == bicubic).all()
        assert (crop.flip == bool(flip)).all()


def test_erasing_is_drawn_as_in_the_recipe() -> None:
    """A quarter of the images get one box inside them: area uniform in .02 to 1/3, aspect log-uniform in .3 to 1/.3."""
    erase = many().erase
    assert erase is not None
    assert len(erase.rows) / MANY == close_to_share(0.25)
    top, left, bottom, right = erase.boxes.T
    height, width = bottom - top, right - left
    assert min(top.min(), left.min()) == 0
    assert max(bottom.max(), right.max()) == 224
    area, aspect = height * width / 224**2, height / width
    assert 0.018 < area.min() < 0.03
    assert 0.32 < area.max() < 0.338  # sides are rounded to pixels
    assert 0.27 < aspect.min() < 0.35
    assert 2.8 < aspect.max() < 3.6
    # Boxes of extreme area and aspect do not fit and are drawn again; a simple simulation gives the expected means.
    rng = np.random.default_rng(0)
    areas, aspects = rng.uniform(0.02, 1 / 3, 200_000), np.exp(rng.uniform(np.log(0.3), -np.log(0.3), 200_000))
    fits = (areas * aspects < 1) & (areas / aspects < 1)
    assert area.mean() == pytest.approx(areas[fits].mean(), abs=0.005)
    assert np.log(aspect).std() == pytest.approx(np.log(aspects[fits]).std(), rel=0.03)
    assert abs(np.log(aspect).mean()) < 0.04
    room = (224 - height, 224 - width)
    assert (top / room[0]).mean() == pytest.approx(0.5, abs=0.02)
    assert (left / room[1]).mean() == pytest.approx(0.5, abs=0.02)
    assert len(np.unique(erase.noise_keys)) == len(erase.noise_keys)
    assert erase.noise_keys.min() >= 0
    assert erase.noise_keys.max() < 2**32


def test_mixing_is_drawn_as_in_the_recipe() -> None:
    """Half of the groups get cutmix, with label weights from the clipped box; the others get mixup, Beta(.8, .8)."""
    mix = many().mix
    assert mix is not None
    groups = len(mix.keep)
    assert groups == MANY // 2
    cut = mix.keep == 1
    assert cut.mean() == pytest.approx(0.5, abs=4 * 0.5 / groups**0.5)
    assert not mix.box[~cut].any()
    assert np.array_equal(mix.label_keep[~cut], mix.keep[~cut])
    mixup = mix.keep[~cut]
    assert mixup.mean() == pytest.approx(0.5, abs=0.02)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.04)
    top, left, bottom, right = mix.box[cut].T
    assert ((top >= 0) & (left >= 0) & (bottom <= 224) & (right <= 224) & (top <= bottom) & (left <= right)).all()
    np.testing.assert_allclose(mix.label_keep[cut], 1 - (bottom - top) * (right - left) / 224**2)
    inside = (top > 0) & (left > 0) & (bottom < 224) & (right < 224)
    assert np.array_equal((bottom - top)[inside], (right - left)[inside])
    assert (bottom - top).max() > 200
    # The unclipped side is 224 sqrt(u) for uniform u, and the centre is uniform; simulate the clipped area.
    rng = np.random.default_rng(0)
    half, centres = 112 * np.sqrt(rng.random(200_000)), 224 * rng.random((2, 200_000))
    sides = (centres + half).clip(0, 224) - (centres - half).clip(0, 224)
    assert ((bottom - top) * (right - left)).mean() == pytest.approx(sides.prod(axis=0).mean(), rel=0.05)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cutmix_alpha": 0.0}, lambda mix: not mix.box.any() and (mix.keep < 1).all()),
        ({"mixup_alpha": 0.0}, lambda mix: (mix.keep == 1).all() and mix.box.any(axis=1).mean() > 0.9),
        ({"mix_probability": 0.3}, lambda mix: 0.6 < (mix.label_keep == 1).mean() < 0.8),
        ({"cutmix_probability": 0.0}, lambda mix: not mix.box.any()),
    ],
)
def test_mixing_options(options: dict[str, float], expected: Callable[[Any], bool]) -> None:
    """An alpha of 0 turns off its kind of mixing, and the probabilities apply to groups."""
    augmentation = AugmentationConfig(mix_group_size=2, **options)  # type: ignore[arg-type]
    mix = training_plan(800, 800, augmentation=augmentation).batch(0, 0).mix
    assert expected(mix)


def test_randaugment_is_drawn_as_in_the_recipe() -> None:
    """A quarter of the images get no operation; operations are equally likely, magnitudes Normal(9, .5) up to 10."""
    draws = many().randaugment
    assert draws is not None
    applied = draws.operation >= 0
    assert applied.shape == (MANY, 2)
    assert (~applied).all(axis=1).mean() == close_to_share(0.25)
    counts = np.bincount(draws.operation[applied], minlength=15)
    expected = applied.sum() / 15
    assert len(counts) == 15
    assert ((counts - expected) ** 2 / expected).sum() < 42.6  # chi square, 14 degrees, 1e-4
    same = (draws.operation[:, 0] == draws.operation[:, 1])[applied.all(axis=1)].mean()
    assert same == pytest.approx(1 / 15, abs=0.015), "drawn with replacement"
    magnitude = draws.magnitude
    assert magnitude.max() == 10
    assert (magnitude == 10).mean() == pytest.approx(0.02275, abs=0.004)
    assert magnitude.mean() == pytest.approx(8.9958, abs=0.01)
    assert np.quantile(magnitude, [0.1587, 0.5, 0.8413]) == pytest.approx([8.5, 9, 9.5], abs=0.02)
    assert draws.negative.mean() == close_to_share(0.5)
    assert draws.bicubic.mean() == close_to_share(0.5)
    columns = np.hstack([applied, magnitude, draws.negative, draws.bicubic]).T
    assert np.abs(np.corrcoef(columns) - np.eye(8)).max() < 4.5 / MANY**0.5
