"""From a configuration to objects: the only folder that knows every component."""

from metaformer.assembly.parts import automatic_loader, locate_weights, make_loader
from metaformer.assembly.preprocessing import resolve
from metaformer.assembly.training import training
from metaformer.assembly.validation import validation

__all__ = ["automatic_loader", "locate_weights", "make_loader", "resolve", "training", "validation"]
