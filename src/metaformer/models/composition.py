"""Describes a network by plain values: its sizes, and the names of its parts. Named networks are compositions too.

Imports no slow modules; `architectures` imports the parts.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from dataclasses import field as dataclass_field
from typing import Any

from metaformer.errors import UserError, unknown_name

ATTENTION_HEAD_DIM = 32


@dataclass(frozen=True)
class PartPath:
    """The location of a part, which `architectures` imports, and the arguments that its name implies.

    Attributes:
        path: `package.module:Class`.
    """

    path: str
    arguments: Mapping[str, Any] = dataclass_field(default_factory=dict)


def _mixer(name: str, **arguments: Any) -> PartPath:
    return PartPath(f"metaformer.models.token_mixers:{name}", arguments)


def _norm(name: str, **arguments: Any) -> PartPath:
    return PartPath(f"metaformer.models.norms:{name}", arguments)


TOKEN_MIXERS = {
    "pooling": _mixer("Pooling"),
    "pooling_5": _mixer("Pooling", pool_size=5),
    "pooling_7": _mixer("Pooling", pool_size=7),
    "pooling_9": _mixer("Pooling", pool_size=9),
    "identity": _mixer("Identity"),
    "random_matrix": _mixer("RandomMatrix"),
    "depthwise_conv": _mixer("DepthwiseConv"),
    "separable_conv": _mixer("SeparableConv"),
    "attention": _mixer("Attention"),
    "attention_without_bias": _mixer("Attention", bias=False),
    "spatial_fc": _mixer("SpatialFC"),
}
NORMS = {
    "group_norm": _norm("group_norm"),
    "group_norm_without_bias": _norm("GroupNormWithoutBias"),
    "layer_norm": _norm("ChannelLayerNorm"),
    "layer_norm_without_bias": _norm("ChannelLayerNorm", eps=1e-6, bias=False),
    "batch_norm": PartPath("torch.nn:BatchNorm2d"),
    "none": _norm("no_norm"),
}
ACTIVATIONS = {
    "gelu": PartPath("torch.nn:GELU"),
    "relu": PartPath("torch.nn:ReLU"),
    "silu": PartPath("torch.nn:SiLU"),
    "squared_relu": PartPath("metaformer.models.activations:SquaredReLU"),
    "star_relu": PartPath("metaformer.models.activations:StarReLU"),
}
_CONV, _LINEAR = (PartPath(f"metaformer.models.channel_mlps:{name}") for name in ("conv_layer", "LinearLayer"))
CHANNEL_MLPS: dict[str, dict[str, Any]] = {  # values of BlockParts
    "conv": {"mlp_layer": _CONV, "mlp_bias": True},
    "conv_without_bias": {"mlp_layer": _CONV, "mlp_bias": False},
    "linear": {"mlp_layer": _LINEAR, "mlp_bias": True},
    "linear_without_bias": {"mlp_layer": _LINEAR, "mlp_bias": False},
    "none": {"channel_mlp": False},
}
RESIDUALS: dict[str, dict[str, Any]] = {  # values of BlockParts
    "plain": {},
    "scaled": {"residual_scale": True},
    "none": {"residual": False},
}
HEADS = {
    name: PartPath(f"metaformer.models.heads:{part}")
    for name, part in (("norm_first", "NormFirstHead"), ("linear", "linear_head"), ("mlp", "mlp_head"))
}
INITIALIZATIONS = {"mlps_and_head": False, "all": True}  # whether it applies to all layers
# The table of each field, and whether the field accepts parts outside it.
_TABLES: dict[str, tuple[Mapping[str, Any], bool]] = {
    "token_mixers": (TOKEN_MIXERS, True),
    "norm": (NORMS, True),
    "activation": (ACTIVATIONS, True),
    "channel_mlps": (CHANNEL_MLPS, False),
    "residuals": (RESIDUALS, False),
    "downsampling_norm": (NORMS, True),
    "head": (HEADS, True),
    "initialization": (INITIALIZATIONS, False),
}

# Types of the fields below, to check values from a file.
_TYPES: dict[Any, Any] = {
    tuple[int, ...]: tuple, tuple[str, ...]: tuple, str: str, float: int | float, int | None: int | None,
}  # fmt: skip
PER_STAGE = ("token_mixers", "channel_mlps", "residuals")


@dataclass(frozen=True)
class Composition:
    """The sizes and parts of a network. The defaults are those of PoolFormer-S12.

    A part is a name in the tables above, or `package.module:Class` for the user's own part, which is constructed with
    the same arguments as those in the table.

    Attributes:
        depths, dims: number of blocks and channels of each stage.
        token_mixers, channel_mlps, residuals: one name for each stage, or one for all.
        norm: the blocks' norm; the head `norm_first` uses it too.
        layer_scale: initial value of LayerScale; 0 leaves it out.
        downsampling_norm: the norm after the stem's convolution, and before the convolutions between stages.
        position_embedding_stage: the stage, counted from 0, that adds a position embedding before its blocks.
        initialization: the layers that start as a truncated normal distribution with std .02; others keep torch's.
        drop_path_rate: rate of the last block; rates rise linearly from 0.
        head_dropout: dropout rate of the head `mlp`.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    token_mixers: tuple[str, ...] = ("pooling",)
    norm: str = "group_norm"
    activation: str = "gelu"
    channel_mlps: tuple[str, ...] = ("conv",)
    residuals: tuple[str, ...] = ("plain",)
    layer_scale: float = 1e-5
    downsampling_norm: str = "none"
    head: str = "norm_first"
    position_embedding_stage: int | None = None
    initialization: str = "mlps_and_head"
    drop_path_rate: float = 0.1
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_names(self)
        _check_settings(self)

    @property
    def own_parts(self) -> list[str]:
        """Return the parts that are not in this project's tables."""
        values = [self.norm, self.activation, self.downsampling_norm, self.head]
        names = [*values, *(name for field in PER_STAGE for name in getattr(self, field))]
        return list(dict.fromkeys(name for name in names if ":" in name))

    def to_json(self) -> str:
        """Return the values as text; equal networks have equal texts."""
        return json.dumps(self.to_values())

    def to_values(self) -> dict[str, Any]:
        """Return the values for a file; equal networks have equal values."""
        return asdict(self.canonical())

    def canonical(self) -> "Composition":
        """Return the same network with a name for each stage everywhere."""
        values: dict[str, Any] = {name: self.per_stage(name) for name in PER_STAGE}
        return replace(self, **values)

    @classmethod
    def from_json(cls, text: str) -> "Composition":
        """Parse the text of `to_json`.

        Raises:
            ValueError: the text is not a composition.
        """
        return cls.from_values(json.loads(text))

    @classmethod
    def from_values(cls, values: Any) -> "Composition":
        """Return the composition with values that were read from a file.

        Raises:
            ValueError: the values are not a composition.
        """
        if not isinstance(values, dict):
            raise ValueError("no object of JSON")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        known = {field.name: field.type for field in fields(cls)}
        for name, value in values.items():
            if name not in known or not isinstance(value, _TYPES[known[name]]) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: not a value of a composition")
            if isinstance(value, tuple) and not all(type(item).__name__ in str(known[name]) for item in value):
                raise ValueError(f"{name}={value!r}: not a list of a composition")
        try:
            return cls(**values)
        except UserError as error:
            raise ValueError(str(error)) from error

    def per_stage(self, name: str) -> tuple[str, ...]:
        """Return the names of one of PER_STAGE, one for each stage."""
        names: tuple[str, ...] = getattr(self, name)
        return names * len(self.depths) if len(names) == 1 else names


def _check_sizes(composition: Composition) -> None:
    for name in ("depths", "dims"):
        values = getattr(composition, name)
        if not values or min(values) < 1:
            raise UserError(f"model.{name}={list(values)}: must be positive numbers, one for each stage")
    if len(composition.depths) != len(composition.dims):
        raise UserError(
            f"model.dims={list(composition.dims)}: has {len(composition.dims)} stages, but model.depths="
            f"{list(composition.depths)} has {len(composition.depths)}; give one number for each stage"
        )


def _check_names(composition: Composition) -> None:
    """Raise an error for unknown names. The user's own parts are not imported, because a checkpoint may name them."""
    for field, (table, own) in _TABLES.items():
        value: str | tuple[str, ...] = getattr(composition, field)
        names = (value,) if isinstance(value, str) else value
        if len(names) not in (1, len(composition.depths)):
            raise UserError(
                f"model.{field}={list(names)}: has {len(names)} names for {len(composition.depths)} stages; "
                "give one for each stage, or one for all"
            )
        for name in names:
            if name not in table and not (own and ":" in name):
                raise unknown_name(f"model.{field}", name, table)


def _check_settings(composition: Composition) -> None:
    stages = len(composition.depths)
    for dim, mixer in zip(composition.dims, composition.per_stage("token_mixers"), strict=True):
        if mixer in ("attention", "attention_without_bias") and dim % ATTENTION_HEAD_DIM:
            raise UserError(
                f"model.dims={list(composition.dims)}: attention has {ATTENTION_HEAD_DIM} channels per head, and {dim} "
                f"is no multiple of it; use multiples of {ATTENTION_HEAD_DIM} in stages with attention"
            )
    stage = composition.position_embedding_stage
    if stage is not None and not 0 <= stage < stages:
        raise UserError(f"model.position_embedding_stage={stage}: must be in [0, {stages - 1}], counted from 0")
    for name in ("drop_path_rate", "head_dropout"):
        if not 0 <= getattr(composition, name) < 1:
            raise UserError(f"model.{name}={getattr(composition, name)}: must be in [0, 1)")
    if composition.head_dropout and composition.head in ("norm_first", "linear"):
        raise UserError(f"model.head_dropout={composition.head_dropout}: only the head `mlp` has dropout; set it to 0")
    if composition.layer_scale < 0:
        raise UserError(f"model.layer_scale={composition.layer_scale}: must be positive, or 0 for none")
