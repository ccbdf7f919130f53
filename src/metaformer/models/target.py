"""Creates the user's own networks, from a class or function that the configuration names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metaformer.errors import UserError, one_line
from metaformer.targets import import_target

FIELD = "model.target"


def create_target_model(
    target: str, num_classes: int = 1000, options: Mapping[str, Any] | None = None, image_size: int = 224
) -> nn.Module:
    """Create the user's own network, and check it by computing the logits of two images.

    Args:
        target: `package.module:Class`, or a function; it is called with `num_classes` and the options. The network maps
            float32 images [B, 3, S, S] to logits [B, num_classes].
        num_classes: size of the last layer.
        options: further arguments.
        image_size: side of the images in pixels, S.
    """
    make = import_target(FIELD, target)
    try:
        model = make(num_classes=num_classes, **(options or {}))
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(["num_classes", *(options or {})])
        raise UserError(f"{FIELD}={target}: cannot be made with {given} ({one_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{FIELD}={target}: makes {type(model).__name__}, which is not a torch.nn.Module")
    _try(model, target, num_classes, image_size)
    return model


@torch.no_grad()
def _try(model: nn.Module, target: str, num_classes: int, image_size: int) -> None:
    try:
        logits = model.eval()(torch.zeros(2, 3, image_size, image_size))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{FIELD}={target}: fails for images of [2, 3, {image_size}, {image_size}] "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    finally:
        model.train()
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [2, num_classes]:
        raise UserError(
            f"{FIELD}={target}: makes {shape} of 2 images; must make logits of [2, {num_classes}], for num_classes="
            f"{num_classes}"
        )
