"""Tests of decoded pixels, from writing them to training and validation on them."""

from pathlib import Path

import pytest

from metaformer.models import create_model, save_weights
from tests.conftest import TRAIN_IMAGES, VAL_IMAGES
from tests.end_to_end.test_shards import Run, assert_resumes_on, script


@pytest.fixture(scope="module")
def pixels(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoded") / "pixels"
    done = script("prepare_data", "folder", "--from", images, "--out", out, "--format", "pixels", "--workers=1")
    assert done.code == 0, done.stderr
    assert f"{TRAIN_IMAGES + VAL_IMAGES} images take 0.0 GB as pixels; " in done.stderr
    return out


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_started_on_a_folder_resumes_on_pixels(
    images: Path, pixels: Path, tmp_path: Path, run_program: Run, loader: str
) -> None:
    """A run stopped within an epoch on a folder and resumed on its pixels ends like a run on the folder alone."""
    assert_resumes_on(pixels, images, tmp_path, run_program, loader)


def test_validation_equals_the_folders(images: Path, pixels: Path, tmp_path: Path, run_program: Run) -> None:
    """validate.py counts every image of the pixels once and gives the folder's result."""
    save_weights(create_model("poolformer_s12", 4), tmp_path / "w.safetensors", "poolformer_s12")
    common = ("image_size=32", "workers=1", f"checkpoint={tmp_path / 'w.safetensors'}")
    results = [run_program("validate", *common, f"data.root={root}") for root in (images, pixels)]
    assert {result["images"] for result in results} == {VAL_IMAGES}
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["top5"] == results[1]["top5"]
