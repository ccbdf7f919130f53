"""Builds the objects that a configuration describes; the only package that imports every component."""

from metaformer.assembly.example_pictures import PICTURE_ERRORS, add_pictures_of_run
from metaformer.assembly.parts import automatic_loader, locate_weights, make_loader
from metaformer.assembly.prediction import build_predictor
from metaformer.assembly.preprocessing import resolve_config
from metaformer.assembly.training import build_training
from metaformer.assembly.validation import build_validation

__all__ = [
    "PICTURE_ERRORS",
    "add_pictures_of_run",
    "automatic_loader",
    "build_predictor",
    "build_training",
    "build_validation",
    "locate_weights",
    "make_loader",
    "resolve_config",
]
