"""Tests of RandAugment's draws against those of timm's `rand-m9-mstd0.5-inc1`, recorded over many images."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, rand_augment_transform

from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import TrainingPlan
from metaformer.data.plan.randaugment import (
    ARGUMENTS,
    IMAGENET_COLOUR,
    MAX_MAGNITUDE,
    OPERATIONS,
    Operation,
    RandAugmentDraws,
)

IMAGES = 8000
LEAST_P = 1e-3  # of the statistical tests; the draws are fixed
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
ENHANCING = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")

Applied = list[list[Operation]]  # by image; the sign is meaningless for operations without one


def timms_policy() -> Any:
    """Make the policy as timm's create_transform does for 224 pixels, ImageNet's mean and random interpolation."""
    return rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 100, "img_mean": (124, 116, 104)})


def watch(operation: AugmentOp, seen: list[Operation]) -> None:
    """Make one of timm's operations record its arguments instead of changing the image."""
    to_argument: Callable[..., tuple[Any, ...]] | None = operation.level_fn
    magnitudes: list[float] = []

    def note_magnitude(magnitude: float, hparams: dict[str, Any]) -> tuple[Any, ...]:
        magnitudes.append(magnitude)
        return to_argument(magnitude, hparams) if to_argument else ()

    def note(image: Image.Image, *argument: float, **options: Any) -> Image.Image:
        assert options["fillcolor"] == IMAGENET_COLOUR
        negative = bool(argument) and argument[0] < (1 if operation.name in ENHANCING else 0)
        bicubic = auto_augment._interpolation(options) == Image.Resampling.BICUBIC
        seen.append(Operation(operation.name, magnitudes[-1], negative, bicubic))
        return image

    operation.level_fn, operation.aug_fn = note_magnitude, note


@pytest.fixture(scope="module")
def timms() -> Applied:
    """The operations that timm's policy applies to each of 8000 images."""
    random.seed(0)
    np.random.seed(0)
    policy, seen = timms_policy(), list[Operation]()
    for operation in policy.ops:
        watch(operation, seen)
    image, applied = Image.new("RGB", (1, 1)), []
    for _ in range(IMAGES):
        policy(image)
        applied.append(seen.copy())
        seen.clear()
    return applied


@pytest.fixture(scope="module")
def draws() -> RandAugmentDraws:
    """The plan's draws for one batch."""
    plan = TrainingPlan(
        num_samples=IMAGES,
        global_batch_size=IMAGES,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=9,
        image_size=224,
        crop_pct=0.9,
        augmentation=AugmentationConfig(),
    ).batch(3, 0)
    assert plan.randaugment is not None
    return plan.randaugment


@pytest.fixture(scope="module")
def ours(draws: RandAugmentDraws) -> Applied:
    return [draws.operations_for(row) for row in range(IMAGES)]


def flat(applied: Applied) -> list[Operation]:
    return [operation for operations in applied for operation in operations]


def counts(applied: Applied) -> NDArray[np.int64]:
    """Count how often each operation was applied, in the order of OPERATIONS."""
    names = [operation.name for operation in flat(applied)]
    return np.array([names.count(name) for name in OPERATIONS])


def test_policies_have_the_same_operations(ours: Applied, timms: Applied) -> None:
    """timm's policy has two layers of the same 15 operations at magnitude 9, deviation .5; both apply all of them."""
    policy = timms_policy()
    assert tuple(operation.name for operation in policy.ops) == OPERATIONS
    assert (policy.num_layers, policy.choice_weights) == (2, None)
    settings = {(o.prob, o.magnitude, o.magnitude_std, o.magnitude_max) for o in policy.ops}
    assert settings == {(0.5, 9, 0.5, None)}
    for applied in (ours, timms):
        assert {operation.name for operation in flat(applied)} == set(OPERATIONS)


def test_a_quarter_of_the_images_stays_unchanged(ours: Applied, timms: Applied) -> None:
    """In both, a quarter of the images get no operation, half get one and a quarter get two."""
    for applied in (ours, timms):
        number = np.bincount([len(operations) for operations in applied], minlength=3)
        assert stats.binomtest(int(number[0]), IMAGES, 0.25).pvalue > LEAST_P
        assert stats.chisquare(number, IMAGES * np.array([0.25, 0.5, 0.25])).pvalue > LEAST_P


def test_operations_are_equally_likely(ours: Applied, timms: Applied) -> None:
    """In both, all 15 are equally likely and drawn with replacement: a fifteenth of the pairs are equal."""
    for applied in (ours, timms):
        assert stats.chisquare(counts(applied)).pvalue > LEAST_P
        pairs = [operations for operations in applied if len(operations) == 2]
        same = sum(first.name == second.name for first, second in pairs)
        assert stats.binomtest(same, len(pairs), 1 / 15).pvalue > LEAST_P
    assert stats.chi2_contingency([counts(ours), counts(timms)]).pvalue > LEAST_P


def test_magnitudes_are_normal_clipped_at_ten(ours: Applied, timms: Applied) -> None:
    """In both, magnitudes are Normal(9, .5) clipped at 10, and they pass the two-sample test."""
    samples = [np.array([operation.magnitude for operation in flat(applied)]) for applied in (ours, timms)]
    below_ten = stats.truncnorm(-np.inf, 2, loc=9, scale=0.5)
    for magnitudes in samples:
        assert magnitudes.max() == MAX_MAGNITUDE
        clipped = magnitudes == MAX_MAGNITUDE
        assert stats.binomtest(int(clipped.sum()), len(clipped), stats.norm.sf(2)).pvalue > LEAST_P
        assert stats.kstest(magnitudes[~clipped], below_ten.cdf).pvalue > LEAST_P
    assert stats.ks_2samp(*samples).pvalue > LEAST_P


def test_layers_are_drawn_apart(draws: RandAugmentDraws) -> None:
    """Operations and magnitudes of the two layers of an image are independent."""
    first, second = draws.operation.T
    both = (first >= 0) & (second >= 0)
    table = np.zeros((15, 15))
    np.add.at(table, (first[both], second[both]), 1)
    assert stats.chi2_contingency(table).pvalue > LEAST_P
    assert stats.spearmanr(*draws.magnitude.T).pvalue > LEAST_P
    assert stats.spearmanr(draws.operation[both, 0], draws.magnitude[both, 0]).pvalue > LEAST_P


@pytest.mark.parametrize("names", [SIGNED, ENHANCING], ids=["geometric", "enhancing"])
def test_half_of_the_arguments_are_negative(names: tuple[str, ...], ours: Applied, timms: Applied) -> None:
    """In both, the two directions are equally likely for each operation that has a direction."""
    for applied in (ours, timms):
        for name in names:
            signs = [operation.negative for operation in flat(applied) if operation.name == name]
            assert len(signs) > 400
            assert stats.binomtest(sum(signs), len(signs), 0.5).pvalue > LEAST_P, name


def test_half_of_the_warps_are_bicubic(ours: Applied, timms: Applied) -> None:
    """In both, the filter is drawn for each operation independently, bilinear or bicubic."""
    for applied in (ours, timms):
        filters = [operation.bicubic for operation in flat(applied)]
        assert stats.binomtest(sum(filters), len(filters), 0.5).pvalue > LEAST_P
        pairs = [operations for operations in applied if len(operations) == 2]
        same = sum(first.bicubic == second.bicubic for first, second in pairs)
        assert stats.binomtest(same, len(pairs), 0.5).pvalue > LEAST_P


@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_at_every_level_are_timms(name: str) -> None:
    """At magnitudes 0, .1, ..., 10 the arguments for the two signs are exactly those between which timm draws."""
    random.seed(0)
    to_argument = LEVEL_TO_ARG[name]
    for tenths in range(101):
        magnitude = tenths / 10
        theirs = {to_argument(magnitude, {}) if to_argument else () for _ in range(30)}
        assert {ARGUMENTS[name](magnitude / MAX_MAGNITUDE, negative) for negative in (False, True)} == theirs
        assert len(theirs) == (2 if name in SIGNED + ENHANCING and magnitude else 1)


@pytest.mark.parametrize("name", SIGNED + ENHANCING)
def test_a_negative_argument_is_mirrored(name: str) -> None:
    """The sign mirrors geometric arguments at 0 and enhancement factors at 1, down to .1."""
    for magnitude in np.linspace(0.1, 10, 100):
        (positive,), (negative,) = (ARGUMENTS[name](float(magnitude) / MAX_MAGNITUDE, sign) for sign in (False, True))
        if name in SIGNED:
            assert 0 < positive == -negative
        else:
            assert 1 < positive == pytest.approx(2 - negative, rel=1e-12)
