"""Builds a trained network without its data set, for predictions and exports."""

from typing import NamedTuple

import torch
from torch import nn

from metaformer.assembly.adoption import adopt_weights
from metaformer.assembly.parts import LocatedWeights, make_model
from metaformer.assembly.preprocessing import resolve_config
from metaformer.config import ValidateConfig
from metaformer.models import load_weights
from metaformer.models.config import Preprocessing
from metaformer.models.record import Record
from metaformer.runtime import Runtime

IMAGENET_CLASSES = 1000  # if the weights do not record the number of classes


class TrainedNetwork(NamedTuple):
    """A network with its weights, in eval mode and without gradients.

    Attributes:
        config: the configuration, completed with the weights' record.
        num_classes: number of outputs.
        record: the record of the network in its weights, if there is one.
        notes: messages about given values that differ from the recorded ones.
    """

    config: ValidateConfig
    images: Preprocessing
    model: nn.Module
    num_classes: int
    record: Record | None
    weights: LocatedWeights
    notes: list[str]


def load_trained_network(config: ValidateConfig, runtime: Runtime, dtype: torch.dtype | None) -> TrainedNetwork:
    """Find the weights, build their network and load them.

    Args:
        dtype: the type of matrix products under autocast, or None without autocast.
    """
    checkpoint = config.checkpoint
    assert checkpoint is not None
    config, notes, weights, record = adopt_weights(config, "checkpoint", checkpoint, config.use_ema, runtime)
    config, images = resolve_config(config, checkpoint, evaluation=True)
    num_classes = config.num_classes or (record.num_classes if record else None) or IMAGENET_CLASSES
    model, _ = make_model(config, images, num_classes, runtime, dtype)
    load_weights(model, weights.path, weights.use_ema)
    model.eval().requires_grad_(False)
    return TrainedNetwork(config, images, model, num_classes, record, weights, notes)
