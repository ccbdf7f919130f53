"""Tests of validate.py: exact results over several processes, and its outputs."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

import validate
from metaformer.errors import UserError
from metaformer.evaluation.results import HEADER
from metaformer.models import create_model, save_weights
from tests.conftest import QUICK, REPOSITORY, VAL_IMAGES, launch
from tests.warm import python

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of a four-class PoolFormer-S12."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(create_model("poolformer_s12", num_classes=4), path, "poolformer_s12")
    return path


def test_every_image_counts_once_at_any_world_size(images: Path, weights: Path) -> None:
    """1, 2 and 3 processes with batches of 32 count all images and give the same accuracy."""
    command = (f"checkpoint={weights}", f"data.root={images}", "image_size=32", "eval_batch_size=32", "workers=1")
    results = []
    for ranks in (1, 2, 3):
        done = launch("validate", *command, ranks=ranks)
        assert done.code == 0, done.stderr
        results.append(done.result)
    assert [result["images"] for result in results] == [VAL_IMAGES] * 3
    assert len({(result["top1"], result["top5"]) for result in results}) == 1
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("loader", ["torch", "pil", "dali"])
def test_results_file(images: Path, weights: Path, tmp_path: Path, run_program: Run, loader: str) -> None:
    """Each evaluation appends a row under timm's header."""
    table = tmp_path / "results" / "table.csv"
    command = (f"checkpoint={weights}", f"data.root={images}", "image_size=32", f"loader={loader}", "workers=1")
    result = run_program("validate", *command, f"results_csv={table}")
    run_program("validate", *command, f"results_csv={table}")
    with table.open(newline="") as file:
        header, first, second = csv.reader(file)
    assert tuple(header) == HEADER
    assert first == second
    row = dict(zip(header, first, strict=True))
    assert float(row["top1"]) == pytest.approx(result["top1"], abs=1e-3)
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert row["param_count"] == "11.40"
    assert (row["images"], row["data"], row["checkpoint"]) == (str(VAL_IMAGES), images.name, str(weights))


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, "fc.weight has values that are not finite"), (1e38, "computation overflows; use other weights")],
)
def test_outputs_that_are_not_finite(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
    reason: str,
) -> None:
    """NaN or overflowing weights give null in the JSON, a one-line reason, no row, and exit code 3."""
    model = timm.create_model("test_resnet", num_classes=4)
    model.fc.weight.data.fill_(value)
    save_weights(model, tmp_path / "w", "test_resnet")
    table = tmp_path / "table.csv"
    monkeypatch.setattr(sys, "argv", [
        "validate.py", "model=timm", "model.name=test_resnet", f"checkpoint={tmp_path / 'w'}", f"data.root={images}",
        "image_size=32", "workers=0", "precision=fp32", f"results_csv={table}",
    ])  # fmt: skip
    with pytest.raises(UserError, match=rf"checkpoint=\S+w: the loss is (nan|inf): .*{reason}") as caught:
        validate.main()
    assert caught.value.exit_code == 3
    line = capsys.readouterr().out.splitlines()[-1]
    assert "NaN" not in line
    assert "Infinity" not in line
    result = json.loads(line)
    assert (result["top1"], result["top5"], result["loss"], result["images"]) == (None, None, None, VAL_IMAGES)
    assert not table.exists()


def test_a_results_file_is_checked_first(
    images: Path, weights: Path, tmp_path: Path, run_program: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another header is rejected before the evaluation; if the disk is full afterwards, only the file is lost."""
    command = (f"checkpoint={weights}", f"data.root={images}", "image_size=32", "workers=0")
    (tmp_path / "other.csv").write_text("model,top1\n")
    with pytest.raises(UserError, match=r"results_csv=\S+other\.csv: unexpected header"):
        run_program("validate", *command, f"results_csv={tmp_path / 'other.csv'}")
    printed = capsys.readouterr()
    assert (printed.out, "weights  " in printed.err) == ("", False), "no weights have been loaded"
    with pytest.raises(UserError, match=r"results_csv=/dev/full: cannot be written \(No space left on device\)"):
        run_program("validate", *command, "results_csv=/dev/full")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == VAL_IMAGES


def test_a_result_that_cannot_be_printed(images: Path, weights: Path, tmp_path: Path) -> None:
    """With stdout on a full disk, the result is in its file, one line reports the loss, and the exit code is 2."""
    command = [f"checkpoint={weights}", f"data.root={images}", "image_size=32", "workers=0"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [python(), str(REPOSITORY / "validate.py"), *command, f"results_csv={tmp_path / 'table.csv'}"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: stdout: cannot be written (No space left on device)")
    assert "Traceback" not in done.stderr
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["images"] for row in csv.DictReader(file)] == [str(VAL_IMAGES)]


def test_finds_the_weights_of_a_run(images: Path, tmp_path: Path, run_program: Run) -> None:
    """checkpoint= accepts a run folder, a checkpoint or a file; the accuracy equals that of training."""
    run_dir = tmp_path / "run"
    run_program(
        "train", f"data.root={images}", *QUICK, "epochs=1", "ema=enabled", "ema.decay=0.5", f"run_dir={run_dir}"
    )
    logged = json.loads((run_dir / "checkpoints" / "last" / "manifest.json").read_text())["progress"]["last_validation"]
    command = (f"data.root={images}", "image_size=32", "eval_batch_size=32", "workers=1")
    for place in (run_dir, run_dir / "checkpoints" / "last", run_dir / "checkpoints" / "last" / "model.safetensors"):
        assert run_program("validate", *command, f"checkpoint={place}")["top1"] == logged["top1"]
    averaged = run_program("validate", *command, f"checkpoint={run_dir}", "use_ema=true")
    assert averaged["top1"] == logged["ema_top1"]
    assert averaged["loss"] == pytest.approx(logged["ema_loss"], rel=1e-6)
