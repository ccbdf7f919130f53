"""Predictions for images, and their output as a table, JSON lines or CSV."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from metaformer.errors import printable
from metaformer.files import write_atomically
from metaformer.prediction.class_names import ClassNames

MAX_NAME = 40  # characters of an image's name next to its predictions; longer names have a separate line
CSV_HEADER = ("image", "rank", "class", "name", "description", "probability")


class Guess(NamedTuple):
    """A class and its probability in [0, 1]."""

    label: int
    probability: float


class Prediction(NamedTuple):
    """The most probable classes of an image, best first."""

    image: str
    guesses: list[Guess]


def predict(names: Sequence[str], logits: Tensor, top_k: int) -> list[Prediction]:
    """Return the predictions for images.

    Args:
        names: of the images.
        logits: float32 [B, classes].
        top_k: classes to return for each image, at most all.
    """
    best = logits.softmax(1).topk(min(top_k, logits.shape[1]))
    rows = zip(names, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Prediction(name, [Guess(*guess) for guess in zip(labels, values, strict=True)]) for name, labels, values in rows
    ]


def to_values(prediction: Prediction, classes: ClassNames) -> dict[str, Any]:
    """Return a prediction as the values of a JSON object."""
    descriptions = classes.descriptions
    guesses = [
        {"class": label, "name": classes.names[label], "probability": probability}
        | ({} if descriptions is None else {"description": descriptions[label]})
        for label, probability in prediction.guesses
    ]
    return {"image": prediction.image, "predictions": guesses}


def to_json_line(prediction: Prediction, classes: ClassNames) -> str:
    """Return a prediction as a line of JSON."""
    return json.dumps(to_values(prediction, classes))


def table_lines(predictions: Sequence[Prediction], classes: ClassNames, width: int) -> Iterator[str]:
    """Yield the lines of a table, without its head.

    Args:
        width: characters of the first column.
    """
    for image, guesses in predictions:
        name = printable(image)
        if len(name) > width:
            yield name
            name = ""
        for label, probability in guesses:
            yield f"{name:{width}}  {100 * probability:6.2f} %  {printable(classes.text(label))}"
            name = ""


def table_head(names: Sequence[str]) -> tuple[str, int]:
    """Return the first line of a table for these images, and the width of its first column."""
    lengths = [len(printable(name)) for name in names]
    width = max((length for length in lengths if length <= MAX_NAME), default=len("image"))
    return f"{'image':{width}}  probab.   class", max(width, len("image"))


def write_csv(file: Path, predictions: Sequence[Prediction], classes: ClassNames) -> None:
    """Write a CSV file with a row for each class of each image.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", errors="surrogateescape") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(CSV_HEADER)
            for image, guesses in predictions:
                for rank, (label, probability) in enumerate(guesses, 1):
                    description = "" if classes.descriptions is None else classes.descriptions[label]
                    writer.writerow((image, rank, label, classes.names[label], description, f"{probability:.6f}"))

    write_atomically(file, write)
