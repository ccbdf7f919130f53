"""Reduction of large images, and measurement of its effect on size and quality."""

import math
from collections.abc import Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from metaformer.data.load.bad_file import BAD_FILE, describe_bad_file
from metaformer.data.load.image_file import open_image
from metaformer.data.prepare.source_images import SourceImage, read_source_images
from metaformer.errors import UserError

COMPARED_IMAGES = 200  # images that are compared with their originals
IMAGE_SIZE, CROP_PCT = 224, 0.9


class ReencodingEffect(NamedTuple):
    """Effect of re-encoding images on their size and quality.

    Attributes:
        bytes_before, bytes_after: total size of all images.
        images_compared: number of images sampled to measure the quality.
        mean_difference: mean absolute difference of the sample's pixels, on a scale of 255.
        psnr: peak signal-to-noise ratio in dB, from the sample's mean squared difference; infinite if that is 0.
    """

    bytes_before: int
    bytes_after: int
    images_compared: int
    mean_difference: float
    psnr: float


def reduce_image(encoded: bytes, max_side: int, quality: int) -> bytes:
    """Reduce an image to a JPEG whose longer side is `max_side` pixels; return it unchanged if no side is longer.

    Gray images stay gray; all others become RGB, as in the loaders. Colour profiles and EXIF data are dropped,
    including the EXIF rotation, which loaders ignore.

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the file is not an image.
    """
    with open_image(encoded) as file:
        if max(file.size) <= max_side:
            return encoded
        image = file if file.mode == "L" else file.convert("RGB")
        scale = max_side / max(file.size)
        width, height = (max(1, round(side * scale)) for side in file.size)
        buffer = BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def reduce_source_image(source: SourceImage, encoded: bytes, max_side: int, quality: int) -> bytes:
    """Call `reduce_image` on a source image."""
    try:
        return reduce_image(encoded, max_side, quality)
    except BAD_FILE as error:
        raise UserError(describe_bad_file(source.location, error)) from error


def measure_reencoding(originals: Sequence[SourceImage], packed: Path) -> ReencodingEffect:
    """Compare a folder of shards or pixels with its source images: the total size, and pixels of evenly spaced images.

    Pixels are compared at 224 px with a crop of .9.
    """
    from metaformer.data.index.image_index import find_images
    from metaformer.data.load.image_bytes import ImageBytes
    from metaformer.data.load.pil_reader import PilReader  # imports torch, which worker processes do not need
    from metaformer.data.plan.plan import EvaluationPlan

    index = find_images(packed)
    assert [source.name for source in originals] == [index.name(sample) for sample in range(len(index))]
    samples = np.unique(np.linspace(0, len(index) - 1, COMPARED_IMAGES).astype(np.int64)).tolist()
    plan = EvaluationPlan(
        num_samples=1, batch_size=1, rank=0, world_size=1, image_size=IMAGE_SIZE, crop_pct=CROP_PCT
    ).batch(epoch=0, position=0)
    reader = PilReader()
    absolute, squared = [], []
    with closing(ImageBytes(index)) as stored:
        for sample, (_, encoded) in zip(
            samples, read_source_images(originals[sample] for sample in samples), strict=True
        ):
            before = reader.read(np.frombuffer(encoded, np.uint8), plan, 0)
            difference = reader.read(stored.read(sample), plan, 0).double() - before
            absolute.append(difference.abs().mean().item())
            squared.append(difference.square().mean().item())
    error = float(np.mean(squared))
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return ReencodingEffect(
        bytes_before=sum(source.size for source in originals),
        bytes_after=int(index.sizes.sum()),
        images_compared=len(samples),
        mean_difference=float(np.mean(absolute)),
        psnr=psnr,
    )
