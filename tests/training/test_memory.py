"""Tests of the search for the batches that fit in memory."""

import pytest
import torch
from torch import nn

from metaformer.interfaces import Batch
from metaformer.runtime import Runtime
from metaformer.training.config import LossConfig, PrecisionConfig, PrecisionName
from metaformer.training.losses import make_loss
from metaformer.training.memory import fits, largest_that_fits
from metaformer.training.precision import Precision
from metaformer.training.step import Learner
from tests.training.conftest import tiny_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("first", [1, 6, 64, 100, 1024])
@pytest.mark.parametrize(("multiple", "capacity"), [(1, 37), (2, 96), (2, 97), (4, 333), (2, 2), (2, 1), (1, 0)])
def test_search(first: int, multiple: int, capacity: int) -> None:
    """The result fits, is within an eighth of the capacity, and is found in few tries from wherever it begins."""
    tried = []

    def fake(images: int) -> bool:
        tried.append(images)
        return images <= capacity

    found = largest_that_fits(fake, first, multiple, limit=10_000)
    best = capacity // multiple * multiple
    assert found % multiple == 0
    assert found <= best
    assert best - found <= best // 8
    assert (found > 0) == (best > 0)
    assert len(tried) == len(set(tried)) <= 16
    assert all(images % multiple == 0 for images in tried)


def test_no_more_than_the_limit() -> None:
    """If everything fits, the search ends at the limit, such as the number of images."""
    assert largest_that_fits(lambda images: True, 6, 2, limit=100) == 96


def test_a_step_that_runs_out_of_memory() -> None:
    """With room for 12 images in a forward pass, a step on 12 fits and one on 13 does not, and leaves no gradients."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    learner = Learner(
        state=tiny_state(network),
        network=network,
        precision=Precision(PrecisionConfig(PrecisionName.fp32), CPU),
        runtime=Runtime(0, 1, 0, 1, CPU),
        loss=make_loss(LossConfig()),
        accumulation_steps=2,
    )

    def limit(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 12:
            raise torch.OutOfMemoryError("injected")

    learner.network.register_forward_pre_hook(limit)
    batch = Batch(torch.zeros(4, 3, 32, 32), torch.full((4, 10), 0.1))
    assert [fits(learner, batch, images) for images in (12, 13, 2)] == [True, False, True]
    assert all(parameter.grad is None for parameter in learner.state.model.parameters())
    assert learner.state.skips.tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="expected input"):  # an error of another kind is not hidden
        fits(learner, Batch(torch.zeros(4, 5, 32, 32), batch.targets), 2)
