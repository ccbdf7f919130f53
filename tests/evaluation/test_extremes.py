"""Tests of the worst and best images of a split, compared with a sort of all losses."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from metaformer.evaluation.extremes import COUNT, Extremes, Scored, choose, write_extremes
from metaformer.evaluation.scoring import SINGLE_LABEL
from metaformer.runtime import Runtime

CLASSES, BATCH = 5, 7


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 5, 17, 203])
def test_all_images_are_compared(images: int, ranks: int) -> None:
    """Over any number of ranks, whose shares are those of an evaluation, the images are those of a sort by loss."""
    generator = torch.Generator().manual_seed(images)
    logits = 3 * torch.randn(images, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    kept = []
    for rank in range(ranks):
        extremes = Extremes(Runtime(rank, ranks, rank, ranks, torch.device("cpu")))
        for own in filter(len, torch.arange(images)[rank::ranks].split(BATCH)):
            extremes.add(labels[own], SINGLE_LABEL(logits[own], labels[own]))
        kept.append(extremes.kept())
    worst, best = choose(kept)
    count = min(COUNT, images // 2)
    order = cross_entropy(logits, labels, reduction="none").argsort().tolist()
    assert [image.sample for image in worst] == order[::-1][:count]
    assert [image.sample for image in best] == order[:count]
    for image in (*worst, *best):
        assert image.label == labels[image.sample]
        assert image.predicted == logits[image.sample].argmax()


def test_file(tmp_path: Path) -> None:
    """The file names images and classes; an output without a class has its number, a loss without a number null."""
    file = tmp_path / "validation" / "images.json"
    worst = [Scored(float("inf"), 3, 0, 9)]
    write_extremes(file, (worst, [Scored(0.25, 1, 1, 1)]), 12, lambda sample: f"a/{sample}.jpg", ("cat", "ü"))
    assert json.loads(file.read_text()) == {
        "step": 12,
        "worst": [{"image": "a/3.jpg", "sample": 3, "class": "cat", "predicted": "9", "loss": None}],
        "best": [{"image": "a/1.jpg", "sample": 1, "class": "ü", "predicted": "ü", "loss": 0.25}],
    }
    assert [path.name for path in file.parent.iterdir()] == ["images.json"]
