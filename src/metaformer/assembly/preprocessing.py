"""Resolves preprocessing from the configuration and the network's defaults."""

from dataclasses import replace
from typing import TypeVar

from metaformer.config import CommonConfig
from metaformer.models.config import CropMode, Preprocessing
from metaformer.models.preprocessing import resolve_preprocessing
from metaformer.targets import import_target

C = TypeVar("C", bound=CommonConfig)


def resolve_config(config: C, weights: str | None, evaluation: bool = False) -> tuple[C, Preprocessing]:
    """Resolve the preprocessing; return it, and the configuration with its values filled in.

    Args:
        config: The configuration. A preprocessing field that is None takes the network's default.
        weights: The weights to load, as the user named them.
        evaluation: Whether the network is only evaluated.
    """
    if config.model.target is not None:
        import_target("model.target", config.model.target)  # an error comes before the data set is opened
    images = resolve_preprocessing(config.model, config.image_size, weights, evaluation)
    model = replace(
        config.model,
        crop_pct=images.crop_pct,
        interpolation=images.interpolation,
        crop_mode=CropMode.center,
        mean=list(images.mean),
        std=list(images.std),
    )
    return replace(config, model=model, image_size=images.image_size), images
