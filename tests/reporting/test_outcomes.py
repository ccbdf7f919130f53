"""Results of a row, read from run folders and results files."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from metaformer.composing import compose_recipe
from metaformer.config import TrainConfig, redacted
from metaformer.errors import UserError
from metaformer.reporting.outcomes import Outcome, read_released, read_run
from metaformer.reporting.paper import find_rows

(S12,) = find_rows(["paper/poolformer_s12"])


@pytest.fixture
def recipe() -> TrainConfig:
    return compose_recipe(S12.name)


def values(config: TrainConfig) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def write_run(folder: Path, config: TrainConfig, top1: dict[int, float], images: int = 50_000) -> Path:
    """Write a run folder with a validation for each epoch in `top1`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(redacted(config)))
    lines = [{"kind": "train", "epoch": 1, "loss": 7.0}]
    lines += [{"kind": "validation", "epoch": epoch, "top1": value, "images": images} for epoch, value in top1.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_finished_run_gives_its_best_epoch(tmp_path: Path, recipe: TrainConfig) -> None:
    """The result is the best validation of a run with all 310 epochs, whatever its run folder, workers and seed."""
    ran = compose_recipe(S12.name)
    ran.run_dir, ran.workers, ran.data.root, ran.checkpoint.keep, ran.seed = "elsewhere", 3, "/data", 9, 5
    folder = write_run(tmp_path, ran, {308: 77.0, 309: 77.3, 310: 77.1})
    assert read_run(folder, values(recipe)) == Outcome(77.3, 50_000, folder, "")


def test_an_unfinished_run_gives_no_number(tmp_path: Path, recipe: TrainConfig) -> None:
    """An unfinished run reports its epoch but no top-1; a missing folder is reported as not run."""
    folder = write_run(tmp_path / "run", recipe, {1: 10.0, 309: 77.2})
    assert read_run(folder, values(recipe)) == Outcome(None, None, folder, "epoch 309 of 310")
    assert read_run(tmp_path / "none", values(recipe)) == Outcome(None, None, None, "not run")
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder, values(recipe)).note == "epoch 0 of 310"


def test_differences_from_the_recipe_are_noted(tmp_path: Path, recipe: TrainConfig) -> None:
    """Changed settings and another number of images are noted; another data set gives no result."""
    ran = compose_recipe(S12.name)
    ran.epochs, ran.optimizer.weight_decay = 100, 0.1
    found = read_run(write_run(tmp_path / "a", ran, {110: 60.0}, images=403), values(recipe))
    assert (found.top1, found.images) == (60.0, 403)
    assert found.note == "not the recipe: epochs=100, optimizer.weight_decay=0.1; 403 images, not 50,000"
    ran.data.name = "sample"
    found = read_run(write_run(tmp_path / "b", ran, {110: 99.0}), values(recipe))
    assert (found.top1, found.note) == (None, "not comparable: data.name=sample")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", '{"kind": "validation", "epoch": 310}'),
        ("config.yaml", ""),
        ("config.yaml", "- 1"),
        ("config.yaml", "epochs: 300"),
        ("config.yaml", "a: [\nb"),
    ],
)
def test_a_damaged_run_gives_no_number(tmp_path: Path, recipe: TrainConfig, file: str, text: str) -> None:
    """A file that cannot be read gives a one-line note and no result."""
    folder = write_run(tmp_path, recipe, {310: 77.0})
    (folder / file).write_text(text)
    found = read_run(folder, values(recipe))
    assert (found.top1, found.source) == (None, folder)
    assert found.note.startswith("damaged: ")
    assert len(found.note.splitlines()) == 1


def write_results(path: Path, *rows: tuple[str, str, float, int], model: str = "poolformer_s12") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "img_size", "crop_pct", "interpolation", "checkpoint", "data", "top1", "images"))
        writer.writerows((model, 224, 0.9, "bicubic", *row) for row in rows)
    return path


def test_released_weights_count_when_evaluated_on_imagenet(tmp_path: Path) -> None:
    """The latest line of the row's weights on ImageNet is used; other checkpoints and data sets are ignored."""
    weights = "official:poolformer_s12"
    path = write_results(
        tmp_path / "results.csv",
        (weights, "imagenet", 70.0, 50_000),
        (weights, "imagenet", 77.24, 50_000),
        ("official:poolformer_s24", "imagenet", 80.0, 50_000),
        (weights, "imagenet_v2", 65.5, 10_000),
    )
    assert read_released(S12, path, 0.9, "bicubic") == Outcome(77.24, 50_000, path, "")
    assert read_released(S12, tmp_path / "none.csv", 0.9, "bicubic").note == "not run"
    (without,) = find_rows(["ablation/relu"])
    assert read_released(without, path, 0.9, "bicubic") == Outcome(note="no released weights")
    few = write_results(tmp_path / "few.csv", (weights, "imagenet", 77.0, 403))
    assert read_released(S12, few, 0.9, "bicubic").note == "403 images, not 50,000"


def test_different_evaluation_settings_are_noted(tmp_path: Path) -> None:
    """A network, crop or filter that differs from the row's is noted."""
    row = ("official:poolformer_s12", "imagenet", 12.2, 50_000)
    found = read_released(S12, write_results(tmp_path / "results.csv", row, model="resnet50"), 0.95, "bilinear")
    assert (
        found.note == "model=resnet50, not poolformer_s12; crop_pct=0.9, not 0.95; interpolation=bicubic, not bilinear"
    )


def test_another_csv_is_refused(tmp_path: Path) -> None:
    """A file without the columns gives a one-line error with its name."""
    (tmp_path / "other.csv").write_text("model,top1\npoolformer_s12,77\n")
    with pytest.raises(UserError, match=r"other\.csv: not a results file"):
        read_released(S12, tmp_path / "other.csv", 0.9, "bicubic")
    (tmp_path / "other.csv").write_text(
        "model,img_size,crop_pct,interpolation,data,checkpoint,top1,images\npoolformer_s12,224,0.9,bicubic,imagenet,official:poolformer_s12"
    )
    with pytest.raises(UserError, match=r"other\.csv: not a results file"):
        read_released(S12, tmp_path / "other.csv", 0.9, "bicubic")
