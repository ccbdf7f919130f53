"""Builds a trained network by itself, without the data set that it is evaluated on: to predict, and to export."""

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

IMAGENET_CLASSES = 1000  # outputs of a network whose weights do not record their number


class TrainedNetwork(NamedTuple):
    """A network with its weights, in eval mode and without gradients.

    Attributes:
        config: the configuration, with what the weights bring.
        num_classes: outputs of the network.
        record: what is known of the network from its weights, if anything.
        notes: lines for people: given values that differ from the recorded ones.
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
        dtype: of matrix products under autocast, or None without autocast.
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
