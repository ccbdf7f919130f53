"""Networks and their weights: `create_model`, `list_models`, `load_weights`."""

from metaformer.models.composition import Composition
from metaformer.models.metaformer import MetaFormer, MetaFormerBlock
from metaformer.models.variants import create_model, create_timm_model, list_models
from metaformer.models.weights import load_weights, save_state, save_weights

__all__ = [
    "Composition",
    "MetaFormer",
    "MetaFormerBlock",
    "create_model",
    "create_timm_model",
    "list_models",
    "load_weights",
    "save_state",
    "save_weights",
]
