"""Functions that create networks: the papers' by name, one's own from a composition, and timm's."""

from dataclasses import replace

import timm
from timm.models import PretrainedCfg
from torch import nn

from metaformer.errors import UserError, one_line, unknown_name
from metaformer.models.composition import Composition, build_architecture
from metaformer.models.config import OWN_NETWORK
from metaformer.models.families import COMPOSITIONS
from metaformer.models.metaformer import Architecture, MetaFormer
from metaformer.models.token_mixers import Pooling

POOLING = (Pooling,) * 4
VARIANTS = {name: build_architecture(composition) for name, composition in COMPOSITIONS.items()}


def list_models() -> list[str]:
    """Return the names that `create_model` accepts, in the papers' order."""
    return list(VARIANTS)


def find_architecture(name: str) -> Architecture:
    """Return the architecture of one of `list_models()`."""
    if name not in VARIANTS:
        raise unknown_name("model.name", name, VARIANTS)
    return VARIANTS[name]


def find_timm_cfg(name: str) -> PretrainedCfg:
    """Return timm's configuration of a network's weights; a name without a tag means timm's default weights."""
    if not timm.is_model(name):
        raise unknown_name("model.name", name, timm.list_models())
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True) or PretrainedCfg()
    except RuntimeError as error:  # a tag that is not registered
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise unknown_name("model.name", name, known) from error


def create_model(
    name: str | Composition,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    image_size: int = 224,
    head_dropout: float | None = None,
) -> MetaFormer:
    """Create a network with freshly initialised weights.

    Args:
        name: one of `list_models()`, or the composition of another network.
        num_classes: size of the last layer.
        drop_path_rate: None takes the paper's rate for this network.
        image_size: side of the images in pixels; only networks with position embeddings, spatial FC or a random matrix
            use it.
        head_dropout: None takes the paper's rate; only networks with an MLP head have one.
    """
    architecture = find_architecture(name) if isinstance(name, str) else build_architecture(name)
    if drop_path_rate is not None:
        architecture = replace(architecture, drop_path_rate=drop_path_rate)
    if head_dropout is not None:
        architecture = replace(architecture, head_dropout=head_dropout)
    try:
        return MetaFormer(architecture, num_classes, image_size)
    except (TypeError, ValueError, RuntimeError) as error:  # of a part that does not take these arguments
        named = name if isinstance(name, str) else OWN_NETWORK
        raise UserError(f"model={named}: cannot be made ({one_line(error)})") from error


def create_timm_model(
    name: str, num_classes: int = 1000, drop_path_rate: float | None = None, image_size: int | None = None
) -> nn.Module:
    """Create any of timm's networks with freshly initialised weights.

    Args:
        name: a network of timm.
        num_classes: size of the last layer.
        drop_path_rate: None keeps timm's rate; a rate for a network without drop path is refused.
        image_size: side of the images in pixels, checked where the network takes only one size.
    """
    cfg = find_timm_cfg(name)
    if image_size is not None and cfg.fixed_input_size and cfg.input_size[-1] != image_size:
        size = cfg.input_size[-1]
        raise UserError(f"image_size={image_size}: timm's {name} takes images of {size} pixels; set image_size={size}")
    options = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"model.drop_path_rate={drop_path_rate}: timm's {name} does not accept it ({error})") from error
    return model
