"""RandAugment on batches of tensors with PIL's formulas, for images that are already on a GPU; works on any device.

Images with the same kind of operation are processed together. The operations come from the plan, so nothing here
synchronizes with the device. The formulas are those of Pillow 12 (ImageOps, ImageEnhance and the filters of its C
library), including rounding. All products and sums are rounded one by one, not by fused multiply-adds, so that all
devices, and the Triton kernels of `triton_randaugment`, give the same values.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metaformer.data.device.transfer import to_device
from metaformer.data.plan.randaugment import Operation, RandAugmentDraws

# Takes images uint8 [K, 3, H, W] and the operation of each; returns the augmented images.
BatchFunction = Callable[[Tensor, list[Operation]], Tensor]
BatchAugmentation = Callable[[Tensor, RandAugmentDraws], Tensor]  # as `apply_to_batch`
ROUNDING = 1e-3  # added before truncation, because warps sum in single precision and PIL in double


def apply_to_batch(images: Tensor, draws: RandAugmentDraws) -> Tensor:
    """Augment each image as `plan.randaugment.apply_operations` does.

    Args:
        images: uint8 [B, 3, H, W] of any memory format, which the result keeps; not modified.
        draws: operations of the B images.
    """
    images = images.clone()
    for number in range(draws.operation.shape[1]):
        groups: dict[BatchFunction, list[tuple[int, Operation]]] = {}
        for row in range(len(images)):
            operation = draws.operation_at(row, number)
            if operation is not None:
                groups.setdefault(BATCH_FUNCTIONS[operation.name], []).append((row, operation))
        for function, members in groups.items():
            rows = to_device(torch.tensor([row for row, _ in members]), images.device)
            images.index_copy_(0, rows, function(images.index_select(0, rows), [operation for _, operation in members]))
    return images


# Operations that use a lookup table from old to new values, the same for all pixels of a channel.


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value by its entry in uint8 tables [K, 1 or 3, 256]."""
    return tables.expand(-1, 3, -1).gather(2, images.flatten(2).long()).view(images.shape)


def _fixed_table(operation: Operation) -> Tensor:
    """Return the lookup table of an operation that does not depend on the image: uint8 [256]."""
    old = torch.arange(256)
    (argument,) = operation.arguments or (0,)
    match operation.name:
        case "Invert":
            new = 255 - old
        case "PosterizeIncreasing":
            new = old & (256 - 2 ** (8 - int(argument)))
        case "SolarizeIncreasing":
            new = torch.where(old < argument, old, 255 - old)
        case "SolarizeAdd":
            new = torch.where(old < 128, (old + int(argument)).clamp(max=255), old)
        case _:
            assert operation.name == "BrightnessIncreasing"
            new = _blend(torch.zeros(()), old, torch.tensor(argument))
    return new.to(torch.uint8)


def _apply_fixed_table(images: Tensor, operations: list[Operation]) -> Tensor:
    tables = torch.stack([_fixed_table(operation) for operation in operations])
    return _look_up(images, to_device(tables, images.device)[:, None])


def _auto_contrast(images: Tensor, operations: list[Operation]) -> Tensor:
    """Stretch each channel so that its darkest and brightest values become 0 and 255."""
    present = _histogram(images) > 0
    low, high = _first(present), 255 - _first(present.flip(-1))
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # torch rounds 255 / span twice
    old = torch.arange(256, device=images.device)
    stretched = (old * scale - low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, old).to(torch.uint8))


def _equalize(images: Tensor, operations: list[Operation]) -> Tensor:
    """Equalize the histogram of each channel."""
    counts = _histogram(images)
    brightest = counts.gather(-1, 255 - _first((counts > 0).flip(-1)))
    step = (counts.sum(-1, keepdim=True) - brightest) // 255
    spread = (step // 2 + counts.cumsum(-1) - counts) // step.clamp(min=1)
    old = torch.arange(256, device=images.device)
    return _look_up(images, torch.where(step > 0, spread.clamp(max=255), old).to(torch.uint8))


def _contrast(images: Tensor, operations: list[Operation]) -> Tensor:
    """Blend each image with its mean gray value."""
    gray = _gray(images)
    pixels = gray[0].numel()
    mean = (2 * gray.flatten(1).sum(1) + pixels) // (2 * pixels)
    old = torch.arange(256, device=images.device)
    return _look_up(images, _blend(mean[:, None], old, _factors(images, operations).view(-1, 1))[:, None])


def _histogram(images: Tensor) -> Tensor:
    """Count the values of each channel: int64 [K, 3, 256]."""
    values = images.flatten(2).long()
    ones = torch.ones((), dtype=torch.int64, device=images.device).expand_as(values)
    return torch.zeros(len(images), 3, 256, dtype=torch.int64, device=images.device).scatter_add_(2, values, ones)


def _first(present: Tensor) -> Tensor:
    """Return the position of the first true value: bool [..., N] to int64 [..., 1]."""
    return present.to(torch.uint8).argmax(-1, keepdim=True)


# Operations that blend an image with a copy that has less colour or sharpness; a factor above 1 extrapolates.


def _color(images: Tensor, operations: list[Operation]) -> Tensor:
    return _blend(_gray(images), images, _factors(images, operations))


def _sharpness(images: Tensor, operations: list[Operation]) -> Tensor:
    return _blend(_smooth(images), images, _factors(images, operations))


def _blend(from_: Tensor, to: Tensor, factor: Tensor) -> Tensor:
    """Return from + factor * (to - from), truncated to uint8."""
    from_ = from_.float()
    return (from_ + factor * (to.float() - from_)).clamp(0, 255).to(torch.uint8)


def _factors(images: Tensor, operations: list[Operation]) -> Tensor:
    """Return the blend factors: float32 [K, 1, 1, 1]."""
    factors = torch.tensor([operation.arguments[0] for operation in operations], dtype=torch.float32)
    return to_device(factors, images.device).view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    """Return ITU-R 601 luma in fixed point: int32 [K, 1, H, W]."""
    red, green, blue = images.int().split(1, dim=1)
    gray: Tensor = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return gray


def _smooth(images: Tensor) -> Tensor:
    """Return the rounded 3x3 mean with a centre weight of 5, as int32; border pixels are unchanged."""
    pixels = images.int()
    across = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    window = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    inner = pixels[..., 1:-1, 1:-1]
    inner.copy_((2 * (window + 4 * inner) + 13) // 26)
    return pixels


# Operations that move pixels.


def _warp(images: Tensor, operations: list[Operation]) -> Tensor:
    """Warp each image by its matrix with bilinear or bicubic sampling; pixels outside the image get the fill."""
    height, width = images.shape[-2:]
    matrices = torch.tensor([matrix_of(operation, width, height) for operation in operations], dtype=torch.float64)
    a, b, c, d, e, f = to_device(matrices, images.device).view(-1, 6, 1, 1).unbind(1)
    bicubic = to_device(torch.tensor([operation.bicubic for operation in operations]), images.device).view(-1, 1, 1)
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    left, weights_x = _taps(from_x - 0.5, bicubic)
    top, weights_y = _taps(from_y - 0.5, bicubic)

    flat = images.flatten(2)
    total = torch.zeros(images.shape, device=images.device)
    product = torch.empty_like(total)
    for i, weight_y in enumerate(weights_y):
        line = (top + i).clamp(0, height - 1) * width
        for j, weight_x in enumerate(weights_x):
            position = (line + (left + j).clamp(0, width - 1)).flatten(1)[:, None].expand(-1, 3, -1)
            pixels = flat.gather(2, position).view(images.shape)
            total += torch.mul(pixels, (weight_y * weight_x)[:, None], out=product)
    warped = (total + ROUNDING).clamp(0, 255).to(torch.uint8)
    fill = to_device(torch.tensor([o.fill for o in operations], dtype=torch.uint8), images.device).view(-1, 3, 1, 1)
    return torch.where(inside[:, None], warped, fill)


def _taps(position: Tensor, bicubic: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the first of the four pixels (int64) around a position, and the weights of all four (float32).

    PIL's warps use the cubic with a = -1 (Keys, 1981). For bilinear sampling, the outer two weights are 0.
    """
    floor = position.floor()
    t = (position - floor).float()
    cubic = (-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, -(t**2) + t**3)
    linear = (torch.zeros_like(t), 1 - t, t, torch.zeros_like(t))
    return floor.long() - 1, tuple(torch.where(bicubic, *pair) for pair in zip(cubic, linear, strict=True))


def matrix_of(operation: Operation, width: int, height: int) -> tuple[float, float, float, float, float, float]:
    """Return (a, b, c, d, e, f), which map output position (x, y) to input (ax + by + c, dx + ey + f), in pixels."""
    (amount,) = operation.arguments
    match operation.name:
        case "ShearX":
            return 1, amount, 0, 0, 1, 0
        case "ShearY":
            return 1, 0, 0, amount, 1, 0
        case "TranslateXRel":
            return 1, 0, amount * width, 0, 1, 0
        case "TranslateYRel":
            return 1, 0, 0, 0, 1, amount * height
    assert operation.name == "Rotate"
    sine, cosine = math.sin(-math.radians(amount)), math.cos(math.radians(amount))
    x, y = width / 2, height / 2
    return cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y


BATCH_FUNCTIONS: dict[str, BatchFunction] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _apply_fixed_table,
    "Rotate": _warp,
    "PosterizeIncreasing": _apply_fixed_table,
    "SolarizeIncreasing": _apply_fixed_table,
    "SolarizeAdd": _apply_fixed_table,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _apply_fixed_table,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _warp,
    "ShearY": _warp,
    "TranslateXRel": _warp,
    "TranslateYRel": _warp,
}
