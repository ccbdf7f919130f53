"""Finds the images that a network predicts worst and best, and writes them to a file, which docs/runs.md describes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metaformer.evaluation.scoring import Scores
from metaformer.files import remove_temporaries, to_json, write_text_atomically
from metaformer.runtime import Runtime

COUNT = 8  # number of the worst, and of the best images


class Scored(NamedTuple):
    """An image and its prediction."""

    loss: float
    sample: int
    label: int
    predicted: int


class Extremes:
    """Keeps the images with the highest and the lowest loss on the device, without making the host wait.

    Args:
        runtime: this rank, which evaluates images rank, rank + world_size, ..., in this order.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._seen = runtime, 0  # images so far
        self._kept = torch.zeros(0, 4, dtype=torch.float64, device=runtime.device)

    def add(self, targets: Tensor, scores: Scores) -> None:
        """Compare a batch, with int64 labels [B], with the images kept so far."""
        samples = torch.arange(self._seen, self._seen + len(targets), device=targets.device)
        samples = samples * self._runtime.world_size + self._runtime.rank
        self._seen += len(targets)
        batch = torch.stack([scores.loss.double(), samples, targets, scores.predicted], 1)
        rows = torch.cat([self._kept, batch])
        if len(rows) > 2 * COUNT:
            order = rows[:, 0].argsort(stable=True)
            rows = rows[torch.cat([order[:COUNT], order[-COUNT:]])]
        self._kept = rows

    def total(self) -> tuple[list[Scored], list[Scored]]:
        """Return the worst images over all ranks, worst first, and the best, best first; all ranks must call this."""
        return choose(self._runtime.gather_objects(self.kept()))

    def kept(self) -> list[Scored]:
        """Return this rank's images."""
        return [Scored(loss, *map(int, rest)) for loss, *rest in self._kept.tolist()]


def choose(ranks: Sequence[Sequence[Scored]]) -> tuple[list[Scored], list[Scored]]:
    """Return the worst and the best of all ranks' images. No image is in both; few images are divided evenly."""
    images = sorted(image for kept in ranks for image in kept)
    count = min(COUNT, len(images) // 2)
    return images[: -count - 1 : -1], images[:count]


def write_extremes(
    path: Path,
    extremes: tuple[list[Scored], list[Scored]],
    step: int,
    name: Callable[[int], str],
    classes: Sequence[str],
) -> None:
    """Write a JSON file with `step` and, for the `worst` and `best` images, name, class, predicted class and loss.

    Args:
        name: returns the name of a sample.
        classes: names of the first outputs of the network.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged.
    """

    def describe(image: Scored) -> dict[str, str | int | float]:
        right, predicted = (
            classes[label] if label < len(classes) else str(label) for label in (image.label, image.predicted)
        )
        return {
            "image": name(image.sample), "sample": image.sample, "class": right, "predicted": predicted,
            "loss": image.loss,
        }  # fmt: skip

    worst, best = ([describe(image) for image in images] for images in extremes)
    path.parent.mkdir(exist_ok=True)
    write_text_atomically(path, to_json({"step": step, "worst": worst, "best": best}, indent=1) + "\n")
    remove_temporaries(path)
