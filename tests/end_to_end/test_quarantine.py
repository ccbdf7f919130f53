"""Tests of the quarantine list, from the run that stops at a broken file to the run that skips it."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import validate
from metaformer.errors import UserError
from metaformer.models import create_model, save_weights
from tests.conftest import QUICK, Finished, launch, rows

Run = Callable[..., dict[str, Any]]
IMAGES = 20  # per split


@pytest.fixture
def root(images: Path, tmp_path: Path) -> Path:
    """A data set of 20 training and 20 validation images, with one truncated file in each."""
    root = tmp_path / "data"
    shutil.copytree(images, root, ignore=shutil.ignore_patterns(".metaformer", "0[2-9]?.JPEG", "[1-9]*"))
    for file in (root / "train" / "class_1" / "005.JPEG", root / "val" / "class_2" / "002.JPEG"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return root


def scan(root: Path, file: Path) -> Finished:
    return launch("scripts/scan_data", str(root), "--quarantine", str(file))


def test_from_a_broken_file_to_a_result(root: Path, tmp_path: Path, run_program: Run) -> None:
    """Training stops and names the file, scan_data lists it, and training with the list completes."""
    run_dir, broken = tmp_path / "run", tmp_path / "broken.txt"
    command = (f"data.root={root}", "epochs=1", "ema=enabled", *QUICK, "global_batch_size=10", f"run_dir={run_dir}")
    bad = root / "train" / "class_1" / "005.JPEG"
    with pytest.raises(UserError, match=rf"^{bad}: cannot be read[^\n]*data\.quarantine=FILE[^\n]*scan_data\.py"):
        run_program("train", *command)
    done = scan(root, broken)
    assert (done.code, done.stderr) == (1, "")
    assert broken.read_text().splitlines() == ["train/class_1/005.JPEG", "val/class_2/002.JPEG"]
    result = run_program("train", *command, f"data.quarantine={broken}")
    assert result["quarantined"] == 2
    assert result["images"] == IMAGES - 1
    assert [row["quarantined"] for row in rows(run_dir, "validation")] == [2]
    assert "ema_quarantined" not in rows(run_dir, "validation")[0]
    counts = f"{IMAGES - 1} training, {IMAGES - 1} validation images"
    log = (run_dir / "log.txt").read_text()
    assert re.search(rf"data +{root}: {counts}\n", log)
    assert f"data         1 and 1 more are excluded by {broken}\n" in log


def test_validation_skips_listed_files(
    root: Path, tmp_path: Path, run_program: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """validate.py reports the skipped images in its result and on stderr; without a list it stops."""
    save_weights(create_model("poolformer_s12", 4), tmp_path / "w.safetensors", "poolformer_s12")
    command = (f"data.root={root}", "image_size=32", "workers=0", f"checkpoint={tmp_path / 'w.safetensors'}")
    with pytest.raises(UserError, match=r"val/class_2/002\.JPEG: cannot be read"):
        run_program("validate", *command)
    broken = tmp_path / "broken.txt"
    broken.write_text("train/class_1/005.JPEG\nval/class_2/002.JPEG\n")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["validate.py", *command, f"data.quarantine={broken}"])
    validate.main()
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    assert (result["quarantined"], result["images"]) == (1, IMAGES - 1)
    assert f"data.quarantine={broken}: 1 images excluded\n" in output.err
