"""Test pipeline_parity.py from the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaformer.models import create_model, save_weights
from tests.conftest import VAL_IMAGES, Finished, launch


def compare(*arguments: str) -> Finished:
    return launch("scripts/pipeline_parity", *arguments, "--image-size=32")


def cells(done: Finished, *start: str) -> list[str]:
    """Return the remaining cells of the table row that starts with the given cells."""
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    (row,) = [row for row in table if tuple(row[: len(start)]) == start]
    return row[len(start) :]


def test_pixels_and_predictions_are_compared(
    images: Path, tmp_path: Path, run_program: Callable[..., dict[str, Any]]
) -> None:
    """Torch is closer to PIL than DALI, which is within half a grey level; PIL's top-1 equals validate.py's."""
    save_weights(create_model("poolformer_s12", 4), tmp_path / "w.safetensors", "poolformer_s12")
    checkpoint = f"--checkpoint={tmp_path / 'w.safetensors'}"
    done = compare(str(images / "val"), f"--images={VAL_IMAGES}", checkpoint, "--num-classes=4")
    assert done.code == 0, done.stderr
    for what in ("evaluation, crop .9 (S)", "evaluation, crop .95 (M)", "training, crop and flip"):
        torch_mean, dali_mean = (float(cells(done, what, loader)[0]) for loader in ("torch", "dali"))
        assert torch_mean < 0.05 < dali_mean < 0.5
    mean, maximum, same, top1 = cells(done, "torch")
    assert 0 <= float(mean) <= float(maximum) < 0.1
    assert 90 < float(same.removesuffix(" %")) <= 100
    assert abs(float(top1) - float(cells(done, "pil")[3])) < 5
    overrides = ("image_size=32", "loader=pil", "workers=0", f"checkpoint={tmp_path / 'w.safetensors'}")
    validated = run_program("validate", f"data.root={images}", *overrides)
    assert cells(done, "pil")[3] == f"{validated['top1']:.2f}"


def test_a_flat_folder_has_no_top1(images: Path, tmp_path: Path) -> None:
    """Images without class folders can be compared, and --images limits their number."""
    for number in range(12):
        shutil.copy(images / "val" / "class_0" / f"{4 * number:03}.JPEG", tmp_path / f"{number}.jpg")
    done = compare(str(tmp_path), "--images=5")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("5 images of ")
    assert float(cells(done, "training, RandAugment", "torch")[0]) < 3


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    """A missing folder and an empty one give a one-line error and exit code 2."""
    for arguments, words in (
        ((str(tmp_path / "none"),), "no such folder"),
        ((str(tmp_path),), "contains no images"),
    ):
        refused = compare(*arguments)
        assert refused.code == 2
        (line,) = refused.errors
        assert words in line
