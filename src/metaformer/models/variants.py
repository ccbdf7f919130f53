"""The paper's networks by name, and functions that create them."""

from dataclasses import replace
from functools import partial

import timm
from timm.models import PretrainedCfg
from torch import nn

from metaformer.errors import UserError, unknown_name
from metaformer.models.metaformer import Architecture, BlockParts, MetaFormer, TokenMixer
from metaformer.models.norms import ChannelLayerNorm, no_norm
from metaformer.models.token_mixers import Attention, DepthwiseConv, Identity, Pooling, RandomMatrix, SpatialFC

SMALL_DIMS = (64, 128, 320, 512)
MEDIUM_DIMS = (96, 192, 384, 768)

# Paper, tables 1 and 5, and appendix.
POOLING = (Pooling,) * 4
S12 = Architecture((2, 2, 6, 2), SMALL_DIMS, POOLING, drop_path_rate=0.1)
DEEP = BlockParts(layer_scale_init=1e-6)
LETTERS: dict[str, TokenMixer] = {"p": Pooling, "a": Attention, "f": SpatialFC}


def _with_mixer(token_mixer: TokenMixer) -> Architecture:
    return replace(S12, token_mixers=(token_mixer,) * 4)


def _hybrid(letters: str) -> Architecture:
    """Return a hybrid from one letter per stage: pooling, attention or spatial FC.

    Hybrids with attention use LayerNorm and a position embedding.
    """
    hybrid = replace(S12, token_mixers=[LETTERS[letter] for letter in letters])
    if "a" not in letters:
        return hybrid
    return replace(hybrid, parts=BlockParts(norm=ChannelLayerNorm), position_embedding_stage=letters.index("a"))


VARIANTS = {
    "poolformer_s12": S12,
    "poolformer_s24": replace(S12, depths=(4, 4, 12, 4)),
    "poolformer_s36": Architecture((6, 6, 18, 6), SMALL_DIMS, POOLING, drop_path_rate=0.2, parts=DEEP),
    "poolformer_m36": Architecture((6, 6, 18, 6), MEDIUM_DIMS, POOLING, drop_path_rate=0.3, parts=DEEP),
    "poolformer_m48": Architecture((8, 8, 24, 8), MEDIUM_DIMS, POOLING, drop_path_rate=0.4, parts=DEEP),
    "metaformer_s12_identity": _with_mixer(Identity),
    "metaformer_s12_random_matrix": _with_mixer(RandomMatrix),
    "metaformer_s12_depthwise_conv": _with_mixer(DepthwiseConv),
    "metaformer_s12_pool5": _with_mixer(partial(Pooling, pool_size=5)),
    "metaformer_s12_pool7": _with_mixer(partial(Pooling, pool_size=7)),
    "metaformer_s12_pool9": _with_mixer(partial(Pooling, pool_size=9)),
    "metaformer_s12_layer_norm": replace(S12, parts=BlockParts(norm=ChannelLayerNorm)),
    "metaformer_s12_batch_norm": replace(S12, parts=BlockParts(norm=nn.BatchNorm2d)),
    "metaformer_s12_no_norm": replace(S12, parts=BlockParts(norm=no_norm)),
    "metaformer_s12_relu": replace(S12, parts=BlockParts(activation=nn.ReLU)),
    "metaformer_s12_silu": replace(S12, parts=BlockParts(activation=nn.SiLU)),
    "metaformer_s12_no_residual": replace(S12, parts=BlockParts(residual=False)),
    "metaformer_s12_no_channel_mlp": replace(S12, parts=BlockParts(channel_mlp=False)),
    **{f"metaformer_s12_{letters}": _hybrid(letters) for letters in ("pppa", "ppaa", "pppf", "ppff")},
}


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
    name: str, num_classes: int = 1000, drop_path_rate: float | None = None, image_size: int = 224
) -> MetaFormer:
    """Create a network with freshly initialised weights.

    Args:
        name: one of `list_models()`.
        num_classes: size of the last layer.
        drop_path_rate: None takes the paper's rate for this network.
        image_size: side of the images in pixels; only networks with attention, spatial FC or a random matrix use it.
    """
    architecture = find_architecture(name)
    if drop_path_rate is not None:
        architecture = replace(architecture, drop_path_rate=drop_path_rate)
    return MetaFormer(architecture, num_classes, image_size)


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
