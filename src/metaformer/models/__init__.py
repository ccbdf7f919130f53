"""Networks and their weights: `create_model`, `list_models`, `load_weights`.

Modules that need torch are imported on first use, so that a program can list the networks without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from metaformer.models.composition import Composition
from metaformer.models.families import list_models

if TYPE_CHECKING:
    from metaformer.models.metaformer import MetaFormer, MetaFormerBlock
    from metaformer.models.target import create_target_model
    from metaformer.models.variants import create_model, create_timm_model
    from metaformer.models.weights import load_weights, save_state, save_weights

_MODULES = {
    "MetaFormer": "metaformer",
    "MetaFormerBlock": "metaformer",
    "create_model": "variants",
    "create_target_model": "target",
    "create_timm_model": "variants",
    "load_weights": "weights",
    "save_state": "weights",
    "save_weights": "weights",
}

__all__ = [
    "Composition",
    "MetaFormer",
    "MetaFormerBlock",
    "create_model",
    "create_target_model",
    "create_timm_model",
    "list_models",
    "load_weights",
    "save_state",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
