"""Tests of the counts of each class, compared with a plain computation."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaformer.evaluation.class_counts import MAX_CONFUSION_CLASSES, ClassCounts, ClassTotals
from metaformer.evaluation.scoring import SINGLE_LABEL
from metaformer.runtime import Runtime
from tests.ranks import on_ranks

CPU = Runtime(0, 1, 0, 1, torch.device("cpu"))
CLASSES, IMAGES = 12, 300


def batches(classes: int = CLASSES) -> list[tuple[Tensor, Tensor]]:
    """Return logits and targets in batches of 50; the last class has no images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, classes, generator=generator)
    targets = torch.randint(classes - 1, (IMAGES,), generator=generator)
    return list(zip(logits.split(50), targets.split(50), strict=True))


def count(runtime: Runtime, classes: int = CLASSES) -> ClassTotals:
    """Count this rank's share of the batches."""
    counts = ClassCounts(classes, runtime.device)
    for logits, targets in batches(classes)[runtime.rank :: runtime.world_size]:
        counts.add(targets, SINGLE_LABEL(logits, targets))
    return counts.total(runtime)


def test_equals_a_plain_computation() -> None:
    """Images, top-1, top-5 and confusions are those of a loop over the images."""
    images, top1, top5 = (np.zeros(CLASSES, np.int64) for _ in range(3))
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for logits, targets in batches():
        for scores, target in zip(logits.tolist(), targets.tolist(), strict=True):
            best = sorted(range(CLASSES), key=lambda label, scores=scores: -scores[label])  # type: ignore[misc]
            images[target] += 1
            top1[target] += best[0] == target
            top5[target] += target in best[:5]
            confusion[target, best[0]] += 1
    found = count(CPU)
    for name, expected in (("images", images), ("top1", top1), ("top5", top5), ("confusion", confusion)):
        assert np.array_equal(getattr(found, name), expected), name


def totals_on_rank(runtime: Runtime) -> Any:
    found = count(runtime)
    assert found.confusion is not None
    return [found.images.tolist(), found.top1.tolist(), found.top5.tolist(), found.confusion.tolist()]


def test_ranks_add_up() -> None:
    """The totals of two ranks with a share of the batches each are those of one rank, on both."""
    assert on_ranks(totals_on_rank) == [totals_on_rank(CPU)] * 2


@pytest.mark.parametrize("classes", [MAX_CONFUSION_CLASSES, MAX_CONFUSION_CLASSES + 1])
def test_many_classes_have_no_confusion_matrix(classes: int) -> None:
    """Above the limit only the counts of each class are kept."""
    found = count(CPU, classes)
    assert (found.confusion is None) == (classes > MAX_CONFUSION_CLASSES)
    assert found.images.sum() == IMAGES


class HostReads(TorchDispatchMode):
    """Counts operators that wait for a GPU; torch.bincount reads the largest value."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.bincount.default,
        )
        self.count += operator in waiting
        return operator(*args, **(kwargs or {}))


def test_counting_does_not_wait_for_the_device() -> None:
    """Adding a batch copies nothing to the host."""
    counts, (logits, targets) = ClassCounts(CLASSES, CPU.device), batches()[0]
    with HostReads() as host:
        counts.add(targets, SINGLE_LABEL(logits, targets))
    assert host.count == 0
