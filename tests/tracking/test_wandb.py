"""Tests of Weights & Biases tracking, with the files of real offline runs."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, REPOSITORY, TRAIN_IMAGES, VAL_IMAGES, launch, rows
from tests.tracking.wandb_log import WandbLog, read_wandb_log
from tests.warm import python

pytestmark = pytest.mark.whole

Run = Callable[..., dict[str, Any]]
STEPS_PER_EPOCH = TRAIN_IMAGES // 8
SMALL = (
    *(option for option in QUICK if not option.startswith("tracking=")),
    "workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null",
)  # fmt: skip


def wandb_logs(run_dir: Path) -> list[WandbLog]:
    """Return the logs of a run folder, oldest first, and wait until wandb's process has completed them."""
    deadline = time.monotonic() + 20
    while True:
        logs = [read_wandb_log(folder) for folder in sorted((run_dir / "wandb").glob("offline-run-*"))]
        if all(log.exit_code is not None for log in logs) or time.monotonic() > deadline:
            return logs
        time.sleep(0.1)


def test_records_the_run_and_resumes_it(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Two epochs and a third after a resume: configuration, all rows, the image, checkpoints, and a single run id."""
    run_dir = tmp_path / "run"
    command = (f"data.root={images}", *SMALL, "epochs=3", "tracking=offline", f"run_dir={run_dir}")
    result = run_program("train", *command, f"max_steps={2 * STEPS_PER_EPOCH}")
    assert {"top1", "top5", "images"} <= result.keys(), "wandb prints nothing after the result"

    (log,) = wandb_logs(run_dir)
    assert log.config["optimizer"]["lr"] == 1e-3
    assert log.config["model"]["name"] == "test_resnet"
    assert log.config["augmentation"]["randaugment"]["num_ops"] == 2
    assert log.run_id == (run_dir / "wandb_id").read_text().strip()
    assert_history_is_that_of_the_file(log, run_dir, last_step=2 * STEPS_PER_EPOCH)
    assert {"validation/top1", "validation/ema_top1"} <= log.maxima
    assert log.summary["final/top1"] == result["top1"]
    assert log.exit_code == 0

    (picture,) = (row["train/mixed_images"] for row in log.history if "train/mixed_images" in row)
    assert picture["_type"] == "image-file"
    media = next((run_dir / "wandb").glob("offline-run-*")) / "files" / picture["path"]
    assert media.read_bytes() == (run_dir / "mixed_images.png").read_bytes()
    assert [kind for kind, _ in log.artifacts] == ["model"] * len(log.artifacts)
    assert sorted(alias for _, aliases in log.artifacts for alias in aliases) == ["best", "latest"]

    run_program("train", *command)
    first, second = wandb_logs(run_dir)
    assert second.run_id == first.run_id
    assert [row["step"] for row in second.history if "train/loss" in row] == list(
        range(2 * STEPS_PER_EPOCH + 1, 3 * STEPS_PER_EPOCH + 1)
    )


def assert_history_is_that_of_the_file(log: WandbLog, run_dir: Path, last_step: int) -> None:
    """Check that wandb's history has each row of metrics.jsonl, with figures named KIND/FIGURE and the counts."""
    for kind in ("train", "validation"):
        expected = rows(run_dir, kind)
        assert expected[-1]["step"] == last_step
        assert {"train": "loss", "validation": "top1"}[kind] in expected[0]
        found = [row for row in log.history if any(name.startswith(f"{kind}/l") for name in row)]
        assert len(found) == len(expected)
        for row, logged in zip(expected, found, strict=True):
            counts = {name: row.pop(name) for name in ("epoch", "step", "samples")}
            figures = {f"{kind}/{name}": value for name, value in row.items() if name != "kind"}
            assert (counts | figures).items() <= logged.items()


def test_failed_run_is_marked(images: Path, tmp_path: Path, run_program: Run) -> None:
    """A run that diverges is marked as failed in wandb, with all rows up to that point."""
    run_dir = tmp_path / "run"
    options = ("epochs=3", "tracking=offline", "optimizer.lr=1e18", f"run_dir={run_dir}")
    with pytest.raises(Exception, match="the validation loss is"):
        run_program("train", f"data.root={images}", *SMALL, *options)
    (log,) = wandb_logs(run_dir)
    assert log.exit_code == 1
    assert len([row for row in log.history if "train/loss" in row]) == len(rows(run_dir))


def test_off_leaves_nothing(images: Path, tmp_path: Path, run_program: Run) -> None:
    """tracking=local does not start wandb."""
    run_dir = tmp_path / "run"
    run_program("train", f"data.root={images}", *SMALL, "epochs=1", "tracking=local", f"run_dir={run_dir}")
    assert not (run_dir / "wandb").exists()
    assert not (run_dir / "wandb_id").exists()


def test_dead_server(images: Path, tmp_path: Path) -> None:
    """With a key but an unreachable server, training completes offline; the key is not written to any file."""
    run_dir, key = tmp_path / "run", "0123456789" * 4
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": key,
        "HOME": str(tmp_path / "home"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = (f"data.root={images}", *SMALL, "epochs=1", "tracking=wandb", f"run_dir={run_dir}")
    done = subprocess.run(
        [python(), str(REPOSITORY / "train.py"), *command],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "offline" not in done.stderr, "the unreachable server is not tried for half a minute"
    assert json.loads(done.stdout.splitlines()[-1])["images"] == VAL_IMAGES
    (log,) = wandb_logs(run_dir)
    assert log.exit_code == 0
    assert len([row for row in log.history if "train/loss" in row]) == STEPS_PER_EPOCH
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in written if key.encode() in file.read_bytes()] == []
    assert key not in done.stdout + done.stderr


def test_broken_wandb_does_not_stop_training(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If wandb cannot start because of an invalid setting, two lines report it and training completes."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    run_dir = tmp_path / "run"
    done = launch("train", f"data.root={images}", *SMALL, "epochs=1", "tracking=wandb", f"run_dir={run_dir}")
    assert done.code == 0, done.stderr
    assert done.result["images"] == VAL_IMAGES
    assert len(rows(run_dir)) == STEPS_PER_EPOCH
    first, second = warnings_of(done.stderr)
    assert "restarting it with all rows; training continues" in first
    assert "disabled from now on; training continues" in second


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_API_KEY", "malformed", "the key cannot be used, the run is offline (WANDB_API_KEY invalid"),
        ("WANDB_MODE", "", "WANDB_MODE='' is not one of online, offline,"),
        ("WANDB_MODE", "ofline", "WANDB_MODE='ofline' is not one of online, offline,"),
    ],
)
def test_a_mistake_in_the_environment_makes_an_offline_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """A malformed key or an empty or misspelt mode gives one warning and a complete run that can be uploaded later."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    run_dir = tmp_path / "run"
    done = launch("train", f"data.root={images}", *SMALL, "epochs=1", "tracking=wandb", f"run_dir={run_dir}")
    assert done.code == 0, done.stderr
    (warning,) = warnings_of(done.stderr)
    assert warning.startswith(f"warning: wandb: {message}")
    (log,) = wandb_logs(run_dir)
    assert log.exit_code == 0
    assert_history_is_that_of_the_file(log, run_dir, last_step=STEPS_PER_EPOCH)


def test_a_disabled_mode_is_reported(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_MODE=disabled records nothing and is reported in one line."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run_dir = tmp_path / "run"
    done = launch("train", f"data.root={images}", *SMALL, "epochs=1", "tracking=wandb", f"run_dir={run_dir}")
    assert done.code == 0, done.stderr
    assert warnings_of(done.stderr) == ["warning: wandb: WANDB_MODE=disabled: nothing is recorded"]
    assert not (run_dir / "wandb").exists()


def warnings_of(stderr: str) -> list[str]:
    """Return the warnings about wandb, without progress lines that a slow machine prints."""
    return [line for line in stderr.splitlines() if line.startswith(("warning: wandb", "wandb"))]
