"""From a configuration to objects: the only folder that knows every component."""

from metaformer.build.parts import locate_weights, make_loader
from metaformer.build.training import training, training_result
from metaformer.build.validation import validation

__all__ = ["locate_weights", "make_loader", "training", "training_result", "validation"]
