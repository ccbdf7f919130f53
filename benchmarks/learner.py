"""A learner and random images, with which the benchmarks call `train_step`."""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from metaformer.interfaces import Batch
from metaformer.runtime import Runtime
from metaformer.training.config import EmaConfig, LossConfig, OptimizerConfig, PrecisionConfig, PrecisionName
from metaformer.training.ema import make_ema
from metaformer.training.losses import make_loss
from metaformer.training.optimizer import make_optimizer
from metaformer.training.precision import Precision
from metaformer.training.state import TrainState
from metaformer.training.step import Learner

CLASSES = 1000


def make_learner(
    model: nn.Module, runtime: Runtime, precision: str = "fp32", network: nn.Module | None = None, ema: bool = False
) -> Learner:
    """Return a learner of a model, with AdamW as in the recipe.

    Args:
        network: the wrapped model to call, if the model is wrapped.
    """
    formats = Precision(PrecisionConfig(PrecisionName(precision)), runtime.device)
    state = TrainState(
        model=model,
        ema=make_ema(EmaConfig(enabled=ema), model),
        optimizer=make_optimizer(OptimizerConfig(), model, 1e-3),
        scaler=formats.scaler,
        identity={},
    )
    network = model if network is None else network
    return Learner(state, network, formats, runtime, make_loss(LossConfig()))


def random_batches(size: int, image_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield the same random batch for ever, its images in channels_last."""
    images = torch.randn(size, 3, image_size, image_size, device=device)
    targets = torch.rand(size, CLASSES, device=device).softmax(1)
    batch = Batch(images.contiguous(memory_format=torch.channels_last), targets)
    yield from itertools.repeat(batch)
