"""Builds the architecture of a network from a composition, and imports the parts that it names."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from metaformer.models.composition import (
    ACTIVATIONS,
    CHANNEL_MLPS,
    HEADS,
    INITIALIZATIONS,
    NORMS,
    RESIDUALS,
    TOKEN_MIXERS,
    Composition,
    PartPath,
)
from metaformer.models.metaformer import Architecture, BlockParts
from metaformer.targets import import_target


def build_architecture(composition: Composition) -> Architecture:
    """Return the architecture with the parts that a composition names; the user's own parts are imported."""
    base = BlockParts(
        norm=_find("norm", composition.norm, NORMS),
        activation=_find("activation", composition.activation, ACTIVATIONS),
        layer_scale_init=composition.layer_scale or None,
    )
    mlps = [
        {key: _import(value) if isinstance(value, PartPath) else value for key, value in CHANNEL_MLPS[name].items()}
        for name in composition.per_stage("channel_mlps")
    ]
    residuals = [RESIDUALS[name] for name in composition.per_stage("residuals")]
    return Architecture(
        composition.depths,
        composition.dims,
        [_find("token_mixers", name, TOKEN_MIXERS) for name in composition.per_stage("token_mixers")],
        composition.drop_path_rate,
        base,
        composition.position_embedding_stage,
        [replace(base, **mlp, **residual) for mlp, residual in zip(mlps, residuals, strict=True)],
        _find("downsampling_norm", composition.downsampling_norm, NORMS),
        _find("head", composition.head, HEADS),
        composition.head_dropout,
        INITIALIZATIONS[composition.initialization],
    )


def _import(part: PartPath) -> Any:
    """Import a part of a table, and bind its arguments."""
    found = import_target("part", part.path)
    return partial(found, **part.arguments) if part.arguments else found


def _find(field: str, name: str, table: Mapping[str, PartPath]) -> Any:
    """Return a part of the table, or the user's own part."""
    return _import(table[name]) if name in table else import_target(f"model.{field}", name)
