"""Tests of RandAugment's operations and arguments against timm's."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp

from metaformer.data.plan.augmentation import RandAugmentConfig
from metaformer.data.plan.randaugment import (
    ARGUMENTS,
    DRAWS_PER_OPERATION,
    IMAGENET_COLOUR,
    MAX_MAGNITUDE,
    OPERATIONS,
    Colour,
    Operation,
    apply_operations,
    draw_operations,
)
from tests.data.conftest import picture


@pytest.fixture
def sign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Fix the random sign of timm for a test; True means negative."""
    negative: bool = request.param
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: -value if negative else value)
    return negative


both_signs = pytest.mark.parametrize("sign", [False, True], indirect=True, ids=["positive", "negative"])


def test_operations_are_timms() -> None:
    """The 15 operations are those of timm's `rand-...-inc1`, in the same order."""
    assert list(OPERATIONS) == auto_augment._RAND_INCREASING_TRANSFORMS


@both_signs
@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_are_timms(name: str, sign: bool) -> None:
    """Each operation's argument equals timm's at magnitudes from 0 to 10, for both signs."""
    for magnitude in (0.0, 0.7, 2.5, 5.0, 7.499, 7.5, 8.3, 9.0, 9.61, 9.999, 10.0):
        level_to_argument = LEVEL_TO_ARG[name]
        expected = level_to_argument(magnitude, {}) if level_to_argument else ()
        assert ARGUMENTS[name](magnitude / MAX_MAGNITUDE, sign) == pytest.approx(expected), magnitude


@both_signs
@pytest.mark.parametrize("fill", [IMAGENET_COLOUR, (128, 3, 250)])
@pytest.mark.parametrize("bicubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_timms(name: str, bicubic: bool, sign: bool, fill: Colour) -> None:
    """Each operation changes the image and gives the pixels of timm's AugmentOp with the same fill."""
    image = picture(40, 32, seed=3).point(lambda value: 20 + value * 3 // 4)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    hparams = {"img_mean": fill, "interpolation": resample}
    expected = np.asarray(AugmentOp(name, prob=1.0, magnitude=9.3, hparams=hparams)(image))
    result = np.asarray(apply_operations(image, [Operation(name, 9.3, sign, bicubic, fill)]))
    assert np.array_equal(result, expected)
    assert not np.array_equal(result, np.asarray(image))


def test_operations_follow_one_another() -> None:
    """Operations apply in order, no operations keep the image, and pixels from outside get the fill colour."""
    image = picture(40, 32, seed=3)
    assert np.array_equal(np.asarray(apply_operations(image, [])), np.asarray(image))
    invert, shift = Operation("Invert", 9.0, False, False), Operation("TranslateXRel", 10.0, False, False)
    assert apply_operations(image, [invert, shift]).getpixel((39, 5)) == IMAGENET_COLOUR == (124, 116, 104)
    assert apply_operations(image, [shift, invert]).getpixel((39, 5)) == tuple(255 - value for value in IMAGENET_COLOUR)


def test_draws_become_operations() -> None:
    """Uniform numbers select operation, application, magnitude, sign and filter; unapplied operations are omitted."""
    low, high = 0.0, 1 - 2.0**-53
    uniform = np.array(
        [
            [[low, 0.49, low, low, 0.49, 0.49], [high, 0.51, low, low, low, low]],
            [[high, low, 1 - np.exp(-2), 0.5, 0.51, 0.51], [1 / 15 + 1e-9, low, 1 - np.exp(-8), low, low, low]],
            [[0.5, 0.6, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]],
        ]
    )
    assert uniform.shape[-1] == DRAWS_PER_OPERATION
    draws = draw_operations(RandAugmentConfig(), uniform)
    assert draws.operations_for(0) == [Operation("AutoContrast", 9.0, True, True)]
    last, second = draws.operations_for(1)
    assert last.magnitude == pytest.approx(9 - 0.5 * 2), "two deviations below, at the angle pi"
    assert last._replace(magnitude=0) == Operation("TranslateYRel", 0, False, False)
    assert second == Operation("Equalize", 10.0, True, True), "clipped"
    assert draws.operations_for(2) == []
    always = draw_operations(RandAugmentConfig(probability=1.0, magnitude=4.0, magnitude_std=0.0), uniform)
    assert all(len(always.operations_for(row)) == 2 for row in range(3))
    assert (always.magnitude == 4).all()
