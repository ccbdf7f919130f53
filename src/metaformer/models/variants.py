"""The named networks of the paper, and how to make one."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import timm
from omegaconf import MISSING
from torch import nn

from metaformer.errors import UserError, unknown_name
from metaformer.models.metaformer import MetaFormer
from metaformer.models.token_mixers import Pooling

SMALL_DIMS = (64, 128, 320, 512)
MEDIUM_DIMS = (96, 192, 384, 768)


class Library(Enum):
    """Whose networks a name belongs to."""

    metaformer = "metaformer"
    timm = "timm"


@dataclass
class ModelConfig:
    """A network by name."""

    name: str = MISSING
    library: Library = Library.metaformer
    drop_path_rate: float | None = None  # None: the paper's rate for this network, or timm's default
    crop_pct: float = 0.9  # evaluation resizes the short side to image_size / crop_pct


@dataclass(frozen=True)
class Variant:
    """What tells one PoolFormer from another (paper, table 1 and appendix)."""

    depths: Sequence[int]
    dims: Sequence[int]
    drop_path_rate: float
    layer_scale_init: float


VARIANTS = {
    "poolformer_s12": Variant((2, 2, 6, 2), SMALL_DIMS, drop_path_rate=0.1, layer_scale_init=1e-5),
    "poolformer_s24": Variant((4, 4, 12, 4), SMALL_DIMS, drop_path_rate=0.1, layer_scale_init=1e-5),
    "poolformer_s36": Variant((6, 6, 18, 6), SMALL_DIMS, drop_path_rate=0.2, layer_scale_init=1e-6),
    "poolformer_m36": Variant((6, 6, 18, 6), MEDIUM_DIMS, drop_path_rate=0.3, layer_scale_init=1e-6),
    "poolformer_m48": Variant((8, 8, 24, 8), MEDIUM_DIMS, drop_path_rate=0.4, layer_scale_init=1e-6),
}


def list_models() -> list[str]:
    """Names that `create_model` knows, in the paper's order."""
    return list(VARIANTS)


def create_model(name: str, num_classes: int = 1000, drop_path_rate: float | None = None) -> MetaFormer:
    """Make a network with freshly initialised weights.

    Args:
        name: one of `list_models()`.
        num_classes: size of the last layer.
        drop_path_rate: None takes the paper's rate for this network.

    Raises:
        UserError: the name is unknown.
    """
    if name not in VARIANTS:
        raise unknown_name("model.name", name, VARIANTS)
    variant = VARIANTS[name]
    return MetaFormer(
        depths=variant.depths,
        dims=variant.dims,
        token_mixers=[Pooling] * len(variant.depths),
        num_classes=num_classes,
        drop_path_rate=variant.drop_path_rate if drop_path_rate is None else drop_path_rate,
        layer_scale_init=variant.layer_scale_init,
    )


def create_timm_model(name: str, num_classes: int = 1000, drop_path_rate: float | None = None) -> nn.Module:
    """Make any of timm's networks with freshly initialised weights; None leaves timm's own drop path rate.

    Raises:
        UserError: timm does not know the name, or the network takes no drop path.
    """
    if not timm.is_model(name):
        raise unknown_name("model.name", name, timm.list_models())
    options = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"model.drop_path_rate={drop_path_rate}: timm's {name} refuses it ({error})") from error
    return model
