"""RandAugment (`rand-m9-mstd0.5-inc1` in timm's notation) with the plan's draws, by PIL, with timm's pixels.

The draws come from the plan, so every loader applies the same operations with the same arguments to a sample. timm's
own functions would bring the whole of timm and torch's compiler into the server of loader workers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from metaformer.data.plan.augmentation import RandAugmentConfig
from metaformer.data.plan.draws import Float64

MAX_MAGNITUDE = 10.0
Colour = tuple[int, int, int]
IMAGENET_COLOUR: Colour = (124, 116, 104)  # ImageNet's mean
DRAWS_PER_OPERATION = 6


def _signed(value: float, negative: bool) -> float:
    return -value if negative else value


def _enhance(level: float, negative: bool) -> float:
    return max(0.1, 1.0 + _signed(level * 0.9, negative))


# Maps each operation to a function that computes its argument from the level (magnitude / 10, in [0, 1]) and the sign.
ARGUMENTS: dict[str, Callable[[float, bool], tuple[float, ...]]] = {
    "AutoContrast": lambda level, negative: (),
    "Equalize": lambda level, negative: (),
    "Invert": lambda level, negative: (),
    "Rotate": lambda level, negative: (_signed(level * 30.0, negative),),  # degrees
    "PosterizeIncreasing": lambda level, negative: (4 - int(level * 4),),  # bits kept
    "SolarizeIncreasing": lambda level, negative: (256 - min(256, int(level * 256)),),  # threshold
    "SolarizeAdd": lambda level, negative: (min(128, int(level * 110)),),  # added to pixels under 128
    "ColorIncreasing": lambda level, negative: (_enhance(level, negative),),
    "ContrastIncreasing": lambda level, negative: (_enhance(level, negative),),
    "BrightnessIncreasing": lambda level, negative: (_enhance(level, negative),),
    "SharpnessIncreasing": lambda level, negative: (_enhance(level, negative),),
    "ShearX": lambda level, negative: (_signed(level * 0.3, negative),),
    "ShearY": lambda level, negative: (_signed(level * 0.3, negative),),
    "TranslateXRel": lambda level, negative: (_signed(level * 0.45, negative),),  # share of the side
    "TranslateYRel": lambda level, negative: (_signed(level * 0.45, negative),),
}
OPERATIONS = tuple(ARGUMENTS)


class Operation(NamedTuple):
    """An operation on one image."""

    name: str
    magnitude: float  # 0 to 10
    negative: bool  # sign of geometric operations, direction of the enhancing ones
    bicubic: bool  # interpolation of geometric operations; bilinear if False
    fill: Colour = IMAGENET_COLOUR  # colour of pixels that a geometric operation takes from outside the image

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the operation's function after the image: none, or one number."""
        return ARGUMENTS[self.name](self.magnitude / MAX_MAGNITUDE, self.negative)


class RandAugmentDraws(NamedTuple):
    """The operations of a batch, as arrays [B, num_ops], and their common fill; see `Operation`."""

    operation: NDArray[np.int64]  # position in OPERATIONS, or -1 if no operation is applied
    magnitude: Float64
    negative: NDArray[np.bool_]
    bicubic: NDArray[np.bool_]
    fill: Colour = IMAGENET_COLOUR

    def operations_for(self, row: int) -> list[Operation]:
        """Return the operations to apply to an image, in order."""
        drawn = (self.operation_at(row, number) for number in range(self.operation.shape[1]))
        return [operation for operation in drawn if operation is not None]

    def operation_at(self, row: int, number: int) -> Operation | None:
        """Return the drawn operation with this number for an image, or None if it is not applied."""
        operation, magnitude, negative, bicubic = (array[row, number].item() for array in self[:4])
        return None if operation < 0 else Operation(OPERATIONS[operation], magnitude, negative, bicubic, self.fill)


def draw_operations(config: RandAugmentConfig, uniform: Float64, fill: Colour = IMAGENET_COLOUR) -> RandAugmentDraws:
    """Convert uniform numbers [B, num_ops, DRAWS_PER_OPERATION] in [0, 1) to operations."""
    which, applied, radius, angle, sign, filter_ = np.moveaxis(uniform, -1, 0)
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller, 1958
    return RandAugmentDraws(
        operation=np.where(applied < config.probability, (which * len(OPERATIONS)).astype(np.int64), -1),
        magnitude=np.clip(config.magnitude + config.magnitude_std * normal, 0.0, MAX_MAGNITUDE),
        negative=sign < 0.5,
        bicubic=filter_ < 0.5,
        fill=fill,
    )


def apply_operations(image: Image.Image, operations: list[Operation]) -> Image.Image:
    """Apply the operations to an RGB image; its size does not change."""
    for operation in operations:
        image = _apply(image, operation, *operation.arguments)
    return image


def _apply(image: Image.Image, operation: Operation, value: Any = None) -> Image.Image:
    resample = Image.Resampling.BICUBIC if operation.bicubic else Image.Resampling.BILINEAR
    match operation.name:
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return image.rotate(value, resample, fillcolor=operation.fill)
        case "PosterizeIncreasing":
            return ImageOps.posterize(image, value)
        case "SolarizeIncreasing":
            return ImageOps.solarize(image, value)
        case "SolarizeAdd":
            return image.point([level + value if level < 128 else level for level in range(256)] * 3)
        case "ColorIncreasing":
            return ImageEnhance.Color(image).enhance(value)
        case "ContrastIncreasing":
            return ImageEnhance.Contrast(image).enhance(value)
        case "BrightnessIncreasing":
            return ImageEnhance.Brightness(image).enhance(value)
        case "SharpnessIncreasing":
            return ImageEnhance.Sharpness(image).enhance(value)
        case "ShearX":
            warp = (1, value, 0, 0, 1, 0)
        case "ShearY":
            warp = (1, 0, 0, value, 1, 0)
        case "TranslateXRel":
            warp = (1, 0, value * image.width, 0, 1, 0)
        case "TranslateYRel":
            warp = (1, 0, 0, 0, 1, value * image.height)
        case name:
            raise ValueError(f"{name}: not an operation of RandAugment")
    return image.transform(image.size, Image.Transform.AFFINE, warp, resample, fillcolor=operation.fill)
