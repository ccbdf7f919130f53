"""Tests of decoding at a smaller scale: which crops are, how near they are, and what stays exact."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from metaformer.data.load.bad_file import BAD_FILE
from metaformer.data.load.scaled_decoder import choose_scale, decode_scaled
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.plan.geometry import Box
from tests.data.load.test_jpeg_decoder import jpeg
from tests.data.load.test_loaders import evaluation_plan, training_plan

WIDTH, HEIGHT = 403, 301
ENCODED = jpeg(WIDTH, HEIGHT, quality=92)
WHOLE = Box(0, 0, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("box", "size", "scale"),
    [
        (WHOLE, 151, 1),  # less than twice as large
        (WHOLE, 150, 2),
        (WHOLE, 76, 2),
        (WHOLE, 75, 4),
        (WHOLE, 37, 8),
        (WHOLE, 8, 8),
        (Box(20, 10, 360, 280), 64, 4),
        (Box(100, 100, 200, 200), 24, 1),  # a third of the area
    ],
)
def test_scale_of_a_region(box: Box, size: int, scale: int) -> None:
    """A region is reduced as far as it stays at least as large as the result, and only if it is most of the image."""
    assert choose_scale(box, WIDTH, HEIGHT, size) == scale
    region = decode_scaled(ENCODED, box, size, None)
    assert region is not None
    assert region.dtype == torch.uint8
    assert region.shape[0] == 3
    assert abs(region.shape[1] - box.height / scale) <= 1
    assert abs(region.shape[2] - box.width / scale) <= 1
    assert min(region.shape[1:]) >= size


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_scaled_region_is_near_the_reduced_image(mode: str, scale: int) -> None:
    """Its pixels are averages of scale x scale pixels of the region, within 2 of 255, and at the same position."""
    encoded, box = jpeg(400, 304, mode, quality=95), Box(16, 8, 376, 288)
    region = decode_scaled(encoded, box, 288 // scale, None)
    assert region is not None
    with Image.open(BytesIO(encoded.tobytes())) as image:
        expected = np.array(image.convert("RGB").crop(box.corners).reduce(scale)).astype(float)
    difference = np.abs(region.permute(1, 2, 0).numpy() - expected)
    assert 0 < difference.mean() < 2


def test_other_regions_and_validation_stay_exact() -> None:
    """Crops that are not scaled, and all images of an evaluation, equal those of the exact reader."""
    exact, scaled = TorchReader(), TorchReader(scaled=True)
    for plan in (evaluation_plan(size=32).batch(0, 0), training_plan(size=224).batch(0, 0)):
        for row in range(len(plan)):
            assert torch.equal(exact.read(ENCODED, plan, row), scaled.read(ENCODED, plan, row))
    differences = []
    for plan in (training_plan(size=24, batch=13).batch(epoch, 0) for epoch in range(4)):
        for row in range(len(plan)):
            difference = exact.read(ENCODED, plan, row).float() - scaled.read(ENCODED, plan, row)
            differences.append(difference.abs().mean().item())
    assert 0 < sum(difference > 0 for difference in differences) < len(differences)
    assert max(differences) < 8


def test_truncated_files_raise_pils_error() -> None:
    """A file that was cut is refused although only a scaled image of it is needed."""
    with pytest.raises(BAD_FILE, match="image file is truncated"):
        decode_scaled(ENCODED[: len(ENCODED) // 2].copy(), WHOLE, 32, None)
