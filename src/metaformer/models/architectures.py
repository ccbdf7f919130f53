"""From a composition to the architecture of a network: the parts are imported here."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from typing import Any

from metaformer.errors import UserError, one_line
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


def build_architecture(composition: Composition) -> Architecture:
    """Return the architecture with the parts that a composition names; parts of one's own are imported.

    Raises:
        UserError: a part of one's own cannot be imported.
    """
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
    """Return the part that a table defines, with its arguments."""
    found = resolve_name(part.path)
    return partial(found, **part.arguments) if part.arguments else found


def _find(field: str, name: str, table: Mapping[str, PartPath]) -> Any:
    """Return a part of the table, or a part of the user's own."""
    if name in table:
        return _import(table[name])
    try:
        part = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"model.{field}={name}: cannot be imported ({one_line(error)}); give package.module:Class, with the "
            "package in a folder of PYTHONPATH"
        ) from error
    if not callable(part):
        raise UserError(f"model.{field}={name}: is no class or function that makes a module")
    return part
