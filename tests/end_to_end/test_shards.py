"""Tests of shards, from writing them to training and validation on them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.models import create_model, save_weights
from tests.conftest import QUICK, SMALL_NETWORK, VAL_IMAGES, Finished, launch, rows
from tests.end_to_end.test_training import assert_same_checkpoint

Run = Callable[..., dict[str, Any]]


def script(name: str, *arguments: object) -> Finished:
    return launch(f"scripts/{name}", *map(str, arguments))


def packed(source: Path, out: Path) -> Path:
    done = script("prepare_data", "folder", "--from", source, "--out", out, "--format", "shards", "--workers=1")
    assert (done.code, done.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(images, tmp_path_factory.mktemp("packed") / "shards")


def assert_resumes_on(packed: Path, images: Path, tmp_path: Path, run_program: Run, loader: str) -> None:
    """Check that a run resumed on the packed images of a folder ends like a run on the folder alone."""
    common = ("epochs=1", "checkpoint.every_steps=3", *QUICK, *SMALL_NETWORK, f"loader={loader}")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_program("train", *common, f"data.root={images}", f"run_dir={whole}")
    run_program("train", *common, f"data.root={images}", f"run_dir={moved}", "max_steps=4")
    run_program("train", *common, f"data.root={packed}", "data.check=files", f"run_dir={moved}")
    assert rows(moved) == rows(whole)
    assert rows(moved, "validation") == rows(whole, "validation")
    assert_same_checkpoint(moved / "checkpoints" / "last", whole / "checkpoints" / "last")


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_started_on_a_folder_resumes_on_shards(
    images: Path, shards: Path, tmp_path: Path, run_program: Run, loader: str
) -> None:
    """A run stopped within an epoch on a folder and resumed on its shards ends like a run on the folder alone."""
    assert_resumes_on(shards, images, tmp_path, run_program, loader)


def test_validation_equals_the_folders(images: Path, shards: Path, tmp_path: Path, run_program: Run) -> None:
    """validate.py counts every image of the shards once and gives the folder's result."""
    save_weights(create_model("poolformer_s12", 4), tmp_path / "w.safetensors", "poolformer_s12")
    common = ("image_size=32", "workers=1", f"checkpoint={tmp_path / 'w.safetensors'}")
    clock = ("seconds", "images_per_second", "date", "data", "command", "log")
    results = []
    for root in (images, shards):
        result = run_program("validate", *common, f"data.root={root}")
        assert result["images"] == VAL_IMAGES
        results.append(
            {name: result[name] for name in ("top1", "top5", "loss") if name in result and name not in clock}
        )
    assert results[0] == results[1]
    assert "top1" in results[0]


def test_from_a_broken_image_to_a_list(images: Path, tmp_path: Path, run_program: Run) -> None:
    """scan_data names a broken image in a shard as in the folder; training with its list completes."""
    root = tmp_path / "data"
    shutil.copytree(images, root, ignore=shutil.ignore_patterns(".metaformer", "[1-9]*"))
    bad = root / "train" / "class_1" / "005.JPEG"
    bad.write_bytes(bad.read_bytes()[:400])
    shards, listed = packed(root, tmp_path / "shards"), tmp_path / "broken.txt"
    scans = [
        script("scan_data", place, "--quarantine", listed, "--out", tmp_path / "m.csv", "--workers=1").stdout
        for place in (root, shards)
    ]
    assert scans[0].splitlines()[1:] == scans[1].splitlines()[1:]
    assert listed.read_text().splitlines() == ["train/class_1/005.JPEG"]
    assert "train/class_1/005.JPEG," in (tmp_path / "m.csv").read_text()
    data = (f"data.root={shards}", f"data.quarantine={listed}")
    result = run_program("train", *data, "epochs=1", *QUICK, *SMALL_NETWORK, f"run_dir={tmp_path / 'run'}")
    assert result["quarantined"] == 1
