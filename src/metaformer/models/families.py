"""The named networks of both papers: one composition for each."""

from dataclasses import replace
from typing import Any

from metaformer.models.composition import Composition

SMALL_DIMS = (64, 128, 320, 512)
MEDIUM_DIMS = (96, 192, 384, 768)

# "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418), tables 1 and 5, and appendix.
S12 = Composition()
POOLFORMERS = {
    "poolformer_s12": S12,
    "poolformer_s24": replace(S12, depths=(4, 4, 12, 4)),
    "poolformer_s36": replace(S12, depths=(6, 6, 18, 6), drop_path_rate=0.2, layer_scale=1e-6),
    "poolformer_m36": replace(S12, depths=(6, 6, 18, 6), dims=MEDIUM_DIMS, drop_path_rate=0.3, layer_scale=1e-6),
    "poolformer_m48": replace(S12, depths=(8, 8, 24, 8), dims=MEDIUM_DIMS, drop_path_rate=0.4, layer_scale=1e-6),
}
LETTERS = {"p": "pooling", "a": "attention", "f": "spatial_fc"}


def _hybrid(letters: str) -> Composition:
    """Return a hybrid from one letter per stage: pooling, attention or spatial FC.

    Hybrids with attention use LayerNorm and a position embedding.
    """
    hybrid = replace(S12, token_mixers=tuple(LETTERS[letter] for letter in letters))
    if "a" not in letters:
        return hybrid
    return replace(hybrid, norm="layer_norm", position_embedding_stage=letters.index("a"))


ABLATIONS = {
    "identity": replace(S12, token_mixers=("identity",)),
    "random_matrix": replace(S12, token_mixers=("random_matrix",)),
    "depthwise_conv": replace(S12, token_mixers=("depthwise_conv",)),
    "pool5": replace(S12, token_mixers=("pooling_5",)),
    "pool7": replace(S12, token_mixers=("pooling_7",)),
    "pool9": replace(S12, token_mixers=("pooling_9",)),
    "layer_norm": replace(S12, norm="layer_norm"),
    "batch_norm": replace(S12, norm="batch_norm"),
    "no_norm": replace(S12, norm="none"),
    "relu": replace(S12, activation="relu"),
    "silu": replace(S12, activation="silu"),
    "no_residual": replace(S12, residuals=("none",)),
    "no_channel_mlp": replace(S12, channel_mlps=("none",)),
    **{letters: _hybrid(letters) for letters in ("pppa", "ppaa", "pppf", "ppff")},
}

# "MetaFormer Baselines for Vision" (arXiv 2210.13452), tables 1 to 3, and appendix.
BASELINE = Composition(
    norm="group_norm_without_bias",
    activation="star_relu",
    channel_mlps=("conv_without_bias",),
    residuals=("plain", "plain", "scaled", "scaled"),
    layer_scale=0,
    downsampling_norm="layer_norm_without_bias",
    head="linear",
    initialization="all",
)


def _simple_mixers(family: str, token_mixers: tuple[str, ...], m48_drop_path_rate: float) -> dict[str, Composition]:
    """Return the five sizes of a family whose token mixers are not trained."""
    base = replace(BASELINE, token_mixers=token_mixers)
    deep: dict[str, Any] = {"depths": (6, 6, 18, 6)}
    medium: dict[str, Any] = {"dims": MEDIUM_DIMS}
    return {
        f"{family}_s12": base,
        f"{family}_s24": replace(base, depths=(4, 4, 12, 4)),
        f"{family}_s36": replace(base, **deep, drop_path_rate=0.2),
        f"{family}_m36": replace(base, **deep, **medium, drop_path_rate=0.3),
        f"{family}_m48": replace(base, depths=(8, 8, 24, 8), **medium, drop_path_rate=m48_drop_path_rate),
    }


CONVFORMER = replace(
    BASELINE, depths=(3, 3, 9, 3), token_mixers=("separable_conv",), norm="layer_norm_without_bias", head="mlp"
)
# timm has linear layers in stages with attention.
CAFORMER = replace(
    CONVFORMER,
    token_mixers=("separable_conv", "separable_conv", "attention_without_bias", "attention_without_bias"),
    channel_mlps=("conv_without_bias", "conv_without_bias", "linear_without_bias", "linear_without_bias"),
)
DEEP_DEPTHS = (3, 12, 18, 3)
BASELINES = {
    **_simple_mixers("identityformer", ("identity",), m48_drop_path_rate=0.4),
    **_simple_mixers("randformer", ("identity", "identity", "random_matrix", "random_matrix"), m48_drop_path_rate=0.3),
    **_simple_mixers("poolformerv2", ("pooling",), m48_drop_path_rate=0.4),
    **{
        f"{family}_{size}": replace(base, depths=depths, dims=dims, drop_path_rate=rate, head_dropout=dropout)
        for family, base, size, depths, dims, rate, dropout in (
            ("convformer", CONVFORMER, "s18", CONVFORMER.depths, SMALL_DIMS, 0.2, 0.0),
            ("convformer", CONVFORMER, "s36", DEEP_DEPTHS, SMALL_DIMS, 0.3, 0.0),
            ("convformer", CONVFORMER, "m36", DEEP_DEPTHS, (96, 192, 384, 576), 0.4, 0.0),
            ("convformer", CONVFORMER, "b36", DEEP_DEPTHS, (128, 256, 512, 768), 0.6, 0.0),
            ("caformer", CAFORMER, "s18", CAFORMER.depths, SMALL_DIMS, 0.15, 0.0),
            ("caformer", CAFORMER, "s36", DEEP_DEPTHS, SMALL_DIMS, 0.3, 0.4),
            ("caformer", CAFORMER, "m36", DEEP_DEPTHS, (96, 192, 384, 576), 0.4, 0.4),
            ("caformer", CAFORMER, "b36", DEEP_DEPTHS, (128, 256, 512, 768), 0.6, 0.5),
        )
    },
}

COMPOSITIONS = {
    **POOLFORMERS,
    **{f"metaformer_s12_{part}": composition for part, composition in ABLATIONS.items()},
    **BASELINES,
}


def list_models() -> list[str]:
    """Return the names that `create_model` accepts, in the papers' order."""
    return list(COMPOSITIONS)
