"""Making large images smaller, and what that costs."""

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
from metaformer.data.prepare.pieces import Piece, read_pieces
from metaformer.errors import UserError

SAMPLE = 200  # images that are compared with their originals
SIZE, CROP_PCT = 224, 0.9


class Cost(NamedTuple):
    """What re-encoding changed.

    Attributes:
        before, after: bytes of all images.
        compared: images of the sample.
        difference: mean absolute difference of the sample's pixels, of 255.
        psnr: decibels, of the mean squared difference over the sample; infinite where there is none.
    """

    before: int
    after: int
    compared: int
    difference: float
    psnr: float


def reduce_image(encoded: bytes, max_side: int, quality: int) -> bytes:
    """An image whose longer side is `max_side` pixels, as a JPEG; the file as it was where no side is longer.

    Gray stays gray, all else becomes RGB, as a loader converts it. EXIF data, and so a rotation that it asks for, which
    loaders ignore, and colour profiles go.

    Raises:
        OSError, ValueError, ...: one of BAD_FILE, it is no image.
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


def reduce_piece(piece: Piece, encoded: bytes, max_side: int, quality: int) -> bytes:
    """`reduce_image` of a piece.

    Raises:
        UserError: it is no image.
    """
    try:
        return reduce_image(encoded, max_side, quality)
    except BAD_FILE as error:
        place = piece.file if piece.offset == 0 else f"{piece.file}: {piece.name}"
        raise UserError(describe_bad_file(place, error)) from error


def measure_cost(originals: Sequence[Piece], packed: Path) -> Cost:
    """Compare a folder of shards with the images that it was made of: the pixels at 224 px, crop .9, of evenly spread
    images.
    """
    from metaformer.data.index.image_index import find_images
    from metaformer.data.load.image_bytes import ImageBytes  # with torch below it, which worker processes do without
    from metaformer.data.load.pil_reader import read_with_pil
    from metaformer.data.plan.plan import EvaluationPlan

    index = find_images(packed)
    assert [piece.name for piece in originals] == [index.name(sample) for sample in range(len(index))]
    samples = np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(np.int64)).tolist()
    plan = EvaluationPlan(1, 1, 0, 1, SIZE, CROP_PCT).batch(0, 0)
    absolute, squared = [], []
    with closing(ImageBytes(index)) as stored:
        for sample, (_, encoded) in zip(samples, read_pieces(originals[sample] for sample in samples), strict=True):
            before = read_with_pil(np.frombuffer(encoded, np.uint8), plan, 0)
            difference = read_with_pil(stored.read(sample), plan, 0).double() - before
            absolute.append(difference.abs().mean().item())
            squared.append(difference.square().mean().item())
    error = float(np.mean(squared))
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    before_bytes = sum(piece.size for piece in originals)
    return Cost(before_bytes, int(index.sizes.sum()), len(samples), float(np.mean(absolute)), psnr)
