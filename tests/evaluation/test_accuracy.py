"""Accuracy over a split, compared with a plain computation."""

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from metaformer.errors import Interrupted
from metaformer.evaluation.accuracy import Accuracy, evaluate
from metaformer.interfaces import Batch
from metaformer.runtime import Runtime
from metaformer.training.config import PrecisionConfig, PrecisionName
from metaformer.training.interruption import Interruption
from metaformer.training.precision import Precision
from tests.ranks import on_ranks

CPU = Runtime(0, 1, 0, 1, torch.device("cpu"))
FP32 = Precision(PrecisionConfig(PrecisionName.fp32), CPU.device)
IMAGES = 23


@dataclass
class Split:
    """Images whose pixels are class scores, in batches of 7 and a last batch of 2."""

    scores: Tensor
    targets: Tensor

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for start in range(0, len(self.targets), 7):
            yield Batch(self.scores[start : start + 7], self.targets[start : start + 7])

    @property
    def rounds_per_epoch(self) -> int:
        return -(-IMAGES // 7)


class Dropped(nn.Module):
    """A model with dropout, which changes the scores only in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        scores: Tensor = self.dropout(images * self.scale)
        return scores


def split(classes: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(IMAGES, classes, generator=generator)
    return Split(scores, torch.randint(classes, (IMAGES,), generator=generator))


@pytest.mark.parametrize("classes", [2, 4, 5, 12])
def test_equals_a_plain_computation(classes: int) -> None:
    """Top-1, top-5 (100 % for five classes or fewer) and loss, with every image counted once."""
    data = split(classes)
    first = fifth = 0
    loss = 0.0
    for scores, target in zip(data.scores.tolist(), data.targets.tolist(), strict=True):
        rank = sum(score > scores[target] for score in scores)
        first, fifth = first + (rank < 1), fifth + (rank < 5)
        loss += math.log(sum(math.exp(score) for score in scores)) - scores[target]
    found = evaluate(Dropped(), data, FP32, CPU)
    assert found.images == IMAGES
    assert (found.top1, found.top5) == pytest.approx((100 * first / IMAGES, 100 * fifth / IMAGES), rel=1e-12)
    assert (found.top5 == 100) == (classes <= 5)
    assert found.loss == pytest.approx(loss / IMAGES, rel=1e-6)


def test_model_is_left_in_evaluation_mode() -> None:
    """The model is left in evaluation mode with unchanged weights."""
    model = Dropped().train()
    evaluate(model, split(3), FP32, CPU)
    assert not model.training
    assert model.scale == 1


def test_computes_in_the_given_precision() -> None:
    """Under bf16 the matrix products are rounded, but the loss is not summed in bf16."""
    torch.manual_seed(0)
    layer, data = nn.Linear(12, 12), split(12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = layer(data.scores).float()
    rounded = evaluate(layer, data, Precision(PrecisionConfig(PrecisionName.bf16), CPU.device), CPU)
    assert rounded.loss == pytest.approx(float(functional.cross_entropy(logits, data.targets)), rel=1e-6)
    assert rounded.loss != evaluate(layer, data, FP32, CPU).loss


def test_as_a_row() -> None:
    """The row's keys are those of result files and metrics."""
    assert Accuracy(1.0, 2.0, 3.0, 4).as_dict() == {"top1": 1.0, "top5": 2.0, "loss": 3.0, "images": 4}


class Counted(nn.Module):
    """A model that counts the batches that it scores."""

    batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += 1
        return images


@pytest.mark.parametrize("after", [0, 2, 3])
def test_stops_when_asked(after: int) -> None:
    """`stop` is called before each batch; once it returns True, no further batch is scored and there is no result."""
    answers, model = iter([False] * after + [True]), Counted()
    with pytest.raises(Interrupted):
        evaluate(model, split(3), FP32, CPU, stop=lambda: next(answers))
    assert model.batches == after


def test_completes_when_not_asked_to_stop() -> None:
    """A `stop` that always returns False changes nothing."""
    found = evaluate(Counted(), split(3), FP32, CPU, stop=lambda: False)
    assert found == evaluate(Counted(), split(3), FP32, CPU)


def interrupted_evaluation(runtime: Runtime) -> Any:
    """Evaluate on ranks of which the last has fewer batches and gets a signal before its second batch."""
    interruption, model, data = Interruption(runtime), Counted(), split(3)
    last = runtime.rank == runtime.world_size - 1
    if last:
        data = Split(data.scores[:14], data.targets[:14])

    def stop() -> bool:
        if last and model.batches == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return interruption.agreed()

    with interruption.listening():
        try:
            evaluate(model, data, FP32, runtime, stop=stop)
        except Interrupted:
            return model.batches, float(runtime.sum(torch.ones(1)))
    return None


def test_all_ranks_stop_where_one_is_asked() -> None:
    """A signal on one of two ranks stops both before their third batch, and they can still communicate."""
    assert on_ranks(interrupted_evaluation) == [(2, 2.0), (2, 2.0)]


def uneven_evaluation(runtime: Runtime) -> Any:
    """Evaluate where rank 0 has all images and the other rank has none."""
    interruption, data = Interruption(runtime), split(3)
    if runtime.rank:
        data = Split(data.scores[:0], data.targets[:0])
    with interruption.listening():
        found = evaluate(Counted(), data, FP32, runtime, stop=interruption.agreed)
        interruption.finish_vote()
    return found


def test_ranks_with_fewer_batches_keep_asking() -> None:
    """Ranks agree before each batch even if they have different numbers of batches; the result is that of one rank."""
    alone = evaluate(Counted(), split(3), FP32, CPU)
    assert on_ranks(uneven_evaluation) == [alone, alone]
