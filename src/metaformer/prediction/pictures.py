"""Pictures of predictions: heat maps over images, and a grid of images with their classes."""

import io
import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from metaformer.errors import printable
from metaformer.files import write_atomically
from metaformer.prediction.class_names import ClassNames
from metaformer.prediction.predictions import Prediction

MIN_SIDE = 224  # pixels of an overlay; smaller images are enlarged by a whole factor
MAX_IN_GRID = 64
COLUMNS, GUESSES = 4, 3
OPACITY = 0.6  # opacity of a heat map at its maximum
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 112, 75  # pixels; of JPEG


class _Cell(NamedTuple):
    """Measures of a cell of the grid, in inches."""

    width: float
    height: float
    margin: float  # left and right of the image
    head: float  # above the image
    line: float  # height of a line of text


CELL = _Cell(2.7, 3.55, 0.1, 0.3, 0.2)
Pixels = NDArray[np.uint8]  # [S, S, 3]


def to_pixels(image: Tensor) -> Pixels:
    """Return an image uint8 [3, S, S] as an array [S, S, 3]."""
    pixels: Pixels = image.permute(1, 2, 0).contiguous().numpy()
    return pixels


def overlay(pixels: Pixels, heat: Tensor) -> Image.Image:
    """Return the image with a heat map over it: transparent where the map is 0.

    Args:
        heat: float32 [H, W] in [0, 1], on the CPU.
    """
    import matplotlib  # not at the start of a training, which may never draw

    factor = math.ceil(MIN_SIDE / len(pixels))
    side = factor * len(pixels)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    smooth = Image.fromarray(heat.numpy()).resize((side, side), Image.Resampling.BILINEAR)
    strength = np.clip(np.asarray(smooth), 0, 1)
    colours = Image.fromarray((255 * matplotlib.colormaps["plasma"](strength)[..., :3]).astype(np.uint8))
    return Image.composite(colours, image, Image.fromarray((255 * OPACITY * strength).astype(np.uint8)))


def thumbnail(pixels: Pixels, heat: Tensor | None) -> bytes:
    """Return a small JPEG of the image and, beside it, its overlay."""
    pictures = [Image.fromarray(pixels)] + ([] if heat is None else [overlay(pixels, heat)])
    side = THUMBNAIL_SIDE
    small = Image.new("RGB", (side * len(pictures), side))
    for number, picture in enumerate(pictures):
        method = Image.Resampling.LANCZOS if picture.width > side else Image.Resampling.NEAREST
        small.paste(picture.resize((side, side), method), (number * side, 0))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()


class OverlayFiles:
    """Writes overlays to a folder, in files named after the images, with a number if a name occurs again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: set[str] = set()

    def save(self, image: str, picture: Image.Image) -> Path:
        """Write an overlay as PNG and return its file.

        Raises:
            OSError: it cannot be written.
        """
        stem = name = PurePath(image.rpartition(": ")[2]).stem or "image"
        number = 1
        while name in self._used:
            number += 1
            name = f"{stem}-{number}"
        self._used.add(name)
        file = self._folder / f"{name}.png"
        write_atomically(file, lambda temporary: picture.save(temporary, format="PNG"))
        return file


def save_grid(file: Path, images: Sequence[Pixels], predictions: Sequence[Prediction], classes: ClassNames) -> None:
    """Write a PNG file of images with their names and most probable classes below.

    Args:
        images: at most MAX_IN_GRID, with a prediction each.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = columns * CELL.width, rows * CELL.height
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), dpi=110)
        for number, (pixels, prediction) in enumerate(zip(images, predictions, strict=True)):
            row, column = divmod(number, columns)
            left, top = column * CELL.width + CELL.margin, height - row * CELL.height - CELL.head
            side = CELL.width - 2 * CELL.margin
            axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
            axes.set_axis_off()
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(_shorten(PurePath(prediction.image).name, 36), fontsize=8, color="0.35", pad=3)
            for line, (label, probability) in enumerate(prediction.guesses[:GUESSES]):
                text = f"{100 * probability:.1f} %  {_shorten(classes.text(label), 26)}"
                y = -(0.05 + line * CELL.line) / side
                axes.text(0, y, text, transform=axes.transAxes, va="top", weight="normal" if line else "bold")
        write_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))


def _shorten(text: str, length: int) -> str:
    shown = printable(text)
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"
