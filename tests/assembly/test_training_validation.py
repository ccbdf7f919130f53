"""Tests of the files by class that a validation writes."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaformer.errors import UserError
from tests.conftest import CLASSES, QUICK, VAL_IMAGES, rows

Run = Callable[..., dict[str, Any]]
MODEL = ("workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null")
SMALL = (*QUICK, *MODEL, "epochs=1", "max_steps=3", "checkpoint.every_epochs=1")


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_files_agree_with_the_row(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Counts add up to the accuracies that are logged, of the weights and of their average; validate.py agrees."""
    run_dir, data = tmp_path / "run", f"data.root={images}"
    average = ("ema=enabled", "ema.decay=0.9")
    run_program("train", data, *SMALL, *average, f"run_dir={run_dir}")
    (row,) = rows(run_dir, "final")
    for prefix in ("", "ema_"):
        found = read_csv(run_dir / f"{prefix}per_class.csv")
        assert [line["class"] for line in found] == [f"class_{label}" for label in range(CLASSES)]
        counts = [int(line["images"]) for line in found]
        assert sum(counts) == VAL_IMAGES
        for name in ("top1", "top5"):
            percents = [float(line[name]) for line in found]
            assert np.average(percents, weights=counts) == pytest.approx(row[prefix + name], abs=1e-3)
        with np.load(run_dir / "validation" / f"{prefix}confusion.npz", allow_pickle=False) as matrix:
            assert matrix["counts"].dtype == np.int64
            assert matrix["counts"].sum(1).tolist() == counts
            assert 100 * matrix["counts"].trace() / VAL_IMAGES == pytest.approx(row[prefix + "top1"])
            assert matrix["classes"].tolist() == [line["class"] for line in found]
            assert matrix["step"] == 3
    assert not [file for file in run_dir.rglob("*.tmp") if "per_class" in file.name or "confusion" in file.name]
    file = tmp_path / "classes.csv"
    options = ("image_size=32", "precision=fp32", "eval_batch_size=32", f"checkpoint={run_dir}", "use_ema=true")
    run_program("validate", data, *MODEL[:3], *options, f"per_class_csv={file}")
    assert file.read_text() == (run_dir / "ema_per_class.csv").read_text()


def test_a_file_that_cannot_be_written_does_not_end_the_training(
    images: Path, tmp_path: Path, run_program: Run
) -> None:
    """A folder in the place of per_class.csv gives a warning in the log."""
    (tmp_path / "lock").touch()  # it is the folder of a run
    (tmp_path / "per_class.csv").mkdir()
    assert run_program("train", f"data.root={images}", *SMALL, f"run_dir={tmp_path}")["images"] == VAL_IMAGES
    assert "results by class cannot be written" in (tmp_path / "log.txt").read_text()


def test_refused_before_the_evaluation(images: Path, tmp_path: Path, run_program: Run) -> None:
    """validate.py refuses a file that cannot be written, and images with several correct classes."""
    with pytest.raises(UserError, match=r"^per_class_csv=.*: cannot be written \(not a file\)"):
        run_program("validate", f"data.root={images}", *MODEL[:3], "checkpoint=none", f"per_class_csv={tmp_path}")
    with pytest.raises(UserError, match=r"^per_class_csv=a\.csv: images of data=imagenet_real have several correct"):
        run_program("validate", "data=imagenet_real", "checkpoint=none", "per_class_csv=a.csv")
