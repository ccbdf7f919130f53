"""Tests of class names and of the forms in which predictions are written."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from metaformer.prediction.class_names import ClassNames, find_class_names
from metaformer.prediction.pictures import OverlayFiles, overlay
from metaformer.prediction.predictions import predict, table_head, table_lines
from metaformer.prediction.results import Results, Wanted

LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]).log_softmax(1)


def test_names() -> None:
    """Recorded names come first; 1000 unnamed outputs are ImageNet's; others have numbers, which is said."""
    own = find_class_names(("cat", "dog"), 3)
    assert (own.names, own.descriptions, own.text(1)) == (("cat", "dog", "2"), None, "dog")
    assert own.origin == "2 names from the weights; 1 more have only numbers"
    imagenet = find_class_names(None, 1000)
    assert (imagenet.names[0], imagenet.text(0)) == ("n01440764", "tench, Tinca tinca")
    assert len(imagenet.names) == len(imagenet.descriptions or ()) == 1000
    assert "record no names" in imagenet.origin
    assert find_class_names(("n01440764", "n02123045"), 2).text(1).startswith("tabby")
    of_21k = tuple(ImageNetInfo("imagenet-22k").label_names()[:3])
    assert find_class_names(of_21k, 3).descriptions is not None
    numbers = find_class_names(None, 7)
    assert (numbers.text(6), numbers.origin) == ("6", "7 numbers: the weights record no names")


def test_predictions() -> None:
    """The classes are the most probable, best first, with softmax probabilities; there are at most all."""
    found = predict(["a", "b"], LOGITS, 2)
    assert [[guess.label for guess in each.guesses] for each in found] == [[1, 2], [0, 1]]
    assert found[0].guesses[0].probability == pytest.approx(LOGITS[0, 1].exp().item())
    (first, _) = predict(["a", "b"], LOGITS, 50)
    assert sum(guess.probability for guess in first.guesses) == pytest.approx(1)


def test_table() -> None:
    """Columns are as wide as the names; a very long name has its own line; odd characters are escaped."""
    classes = ClassNames(("x", "y\n", "z"), None, "")
    long = "long" * 20
    head, width = table_head(["a\tb", long])
    assert (head, width) == ("image  probab.   class", 5)
    lines = list(table_lines(predict(["a\tb", long], LOGITS, 1), classes, width))
    assert lines == ["a\\tb    66.52 %  y\\n", long, "        90.94 %  x"]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lines are printed batch by batch; the CSV file has a row per class, the grid every image that was read."""
    wanted = Wanted(2, True, tmp_path / "p.csv", tmp_path / "grid.png", tmp_path)
    name = os.fsdecode(b"caf\xe9.jpg")
    results = Results(wanted, find_class_names(("n01440764", "n02123045", "n02123159"), 3), ["b.jpg", name])
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    for row, image in enumerate(("b.jpg", name)):
        results.add([image], pixels[row : row + 1], LOGITS[row : row + 1], torch.eye(4)[None] * (1 - row))
        assert json.loads(capsys.readouterr().out)["image"] == image
    results.add([], pixels[:0], LOGITS[:0], None)
    results.finish()
    assert capsys.readouterr() == (
        "", "warning: 1 heat maps are empty: no position of the layer speaks for the predicted class\n"
    )  # fmt: skip
    with (tmp_path / "p.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["rank"], row["class"]) for row in rows] == [
        ("b.jpg", "1", "1"), ("b.jpg", "2", "2"), (name, "1", "0"), (name, "2", "1")
    ]  # fmt: skip
    assert (rows[2]["name"], rows[2]["description"]) == ("n01440764", "tench, Tinca tinca")
    assert float(rows[2]["probability"]) == pytest.approx(LOGITS[1, 0].exp().item(), abs=1e-6)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (round(2 * 2.7 * 110), round(3.55 * 110))
    assert sorted(file.name for file in tmp_path.glob("*.png")) == sorted(["b.png", "grid.png", f"{name[:-4]}.png"])


def test_overlay(tmp_path: Path) -> None:
    """A map changes the image where it is hot only; small images are enlarged; equal names get numbers."""
    pixels = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    picture = overlay(pixels, heat)
    assert picture.size == (224, 224)
    assert np.asarray(picture)[0, 0].max() > 100
    assert np.asarray(picture)[-1, -1].tolist() == [0, 0, 0]
    files = OverlayFiles(tmp_path)
    saved = [files.save(name, picture).name for name in ("a/x.jpg", "b/x.png", "shard-000000.tar: c/x.JPEG")]
    assert saved == ["x.png", "x-2.png", "x-3.png"]
