"""Scoring, compared with timm, numpy and plain arithmetic."""

import math

import numpy as np
import pytest
import torch
from timm.data import RealLabelsImagenet
from torch.nn import functional

from metaformer.evaluation.scoring import SINGLE_LABEL, Scoring

IMAGES, CLASSES = 300, 1000


def random_logits(classes: int = CLASSES) -> torch.Tensor:
    return 3 * torch.randn(IMAGES, classes, generator=torch.Generator().manual_seed(0))


def test_single_label() -> None:
    """Without options, scoring uses the arg-max, the five best classes and the cross entropy."""
    logits = random_logits(12)
    targets = torch.arange(IMAGES) % 12
    scores = SINGLE_LABEL(logits, targets)
    assert torch.equal(scores.top1, logits.argmax(1) == targets)
    rank = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert torch.equal(scores.top5, rank < 5)
    assert torch.equal(scores.loss, functional.cross_entropy(logits, targets, reduction="none"))


def test_restricted_classes() -> None:
    """With a class mask, scores equal numpy's arg-max, five best and cross entropy among these classes."""
    logits = random_logits(40)
    class_mask = torch.zeros(40, dtype=torch.bool)
    class_mask[[3, 4, 8, 15, 16, 23, 39]] = True
    labels = np.flatnonzero(class_mask.numpy())
    targets = torch.from_numpy(labels)[torch.arange(IMAGES) % len(labels)]
    scores = Scoring(class_mask)(logits, targets)
    subset_logits = logits.numpy()[:, labels].astype(np.float64)
    order = labels[np.argsort(-subset_logits, axis=1)]
    assert np.array_equal(scores.top1.numpy(), order[:, 0] == targets.numpy())
    assert np.array_equal(scores.top5.numpy(), (order[:, :5] == targets.numpy()[:, None]).any(1))
    columns = np.searchsorted(labels, targets.numpy())
    expected = np.log(np.exp(subset_logits).sum(1)) - subset_logits[np.arange(IMAGES), columns]
    assert scores.loss.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert 0 < scores.top1.sum() < scores.top5.sum() < IMAGES
    assert not torch.equal(scores.top1, SINGLE_LABEL(logits, targets).top1)


def test_label_sets_are_timms_real_accuracy() -> None:
    """Top-1 and top-5 equal those of timm's RealLabelsImagenet on the images that have labels."""
    names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 50_001)]
    reference = RealLabelsImagenet(names)
    sets = [sorted(reference.real_labels[name]) for name in names[:IMAGES]]
    logits = random_logits()
    for image, labels in enumerate(sets):
        if image % 2:  # hardly any random prediction would be correct
            logits[image, labels[-1:]] += 9
    reference.add_result(logits)
    scored = [image for image, labels in enumerate(sets) if labels]
    table = torch.full((len(scored), max(map(len, sets))), -1)
    for row, image in enumerate(scored):
        table[row, : len(sets[image])] = torch.tensor(sets[image])
    scores = Scoring(label_sets=table)(logits[scored], torch.arange(len(scored)))
    found = {1: 100 * scores.top1.double().mean().item(), 5: 100 * scores.top5.double().mean().item()}
    assert found == pytest.approx(reference.get_accuracy(), rel=1e-12)
    assert 10 < found[1] < found[5] < 90
    assert len(scored) < IMAGES


def test_loss_of_label_sets() -> None:
    """The loss is -log of the summed probability of the correct labels; for one label it is the cross entropy."""
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    rows = Scoring(label_sets=torch.tensor([[0, 2, -1], [1, -1, -1], [0, 1, 3]]))
    for target, mass in ((0, 0.625), (1, 0.25), (2, 0.875)):
        loss = rows(probabilities.log() + 7, torch.tensor([target])).loss
        assert loss.item() == pytest.approx(-math.log(mass), rel=1e-6)
    padded = Scoring(label_sets=torch.tensor([[1, -1]]))(probabilities.log(), torch.tensor([0]))
    assert not padded.top1.item(), "padding must not match class 0"


def test_few_classes() -> None:
    """With fewer than five classes, every label is among the five best."""
    scores = SINGLE_LABEL(random_logits(3), torch.arange(IMAGES) % 3)
    assert scores.top5.all()
    assert not scores.top1.all()
