"""Test that tracking neither stops nor slows a run, and that no secret reaches a file."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import rows
from tests.faults.conftest import EPOCHS, INTERRUPTED, STEPS, Start, status

Undisturbed = Callable[[int], Path]


def test_nowhere_to_print(start: Start, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Row 21c: if stdout is a full disk, log.txt and status.json report it once, and the run completes with all rows.

    tests/test_streams.py tests broken pipes, stderr and closed descriptors.
    """
    (tmp_path / "job0-0.out").symlink_to("/dev/full")
    job = start(tmp_path / "run")
    assert job.wait(60) == [0], job.stderr
    for kind in ("train", "validation", "final"):
        assert rows(tmp_path / "run", kind) == rows(undisturbed(1), kind)
    assert (tmp_path / "run" / "log.txt").read_text().count("ALARM        stdout cannot be written (No space") == 1
    assert status(tmp_path / "run")["console"] == "stdout cannot be written (No space left on device)"
    assert job.stderr.startswith("warning: stdout: cannot be written (No space left on device)")
    assert len(job.stderr.splitlines()) == 1


@pytest.mark.parametrize("fault", ["tracker-raises", "tracker-blocks", "tracker-blocks-at-start"])
def test_a_tracker_in_trouble(start: Start, undisturbed: Undisturbed, tmp_path: Path, fault: str) -> None:
    """Row 21: if wandb raises at each row or blocks, metrics.jsonl has every row, and the run completes normally."""
    close_seconds = 60 if fault == "tracker-raises" else 1
    job = start(tmp_path / "run", "tracking=offline", f"tracking.close_seconds={close_seconds}", faults=f"0:0:{fault}")
    assert job.wait(60) == [0], job.stderr
    for kind in ("train", "validation"):
        assert rows(tmp_path / "run", kind) == rows(undisturbed(1), kind)
    warnings = [line for line in job.stderr.splitlines() if line.startswith("warning: wandb")]
    if fault == "tracker-raises":
        first, second = warnings
        assert "bad day; restarting it" in first
        assert "bad day; disabled from now on; training continues; `wandb sync" in second
    else:
        (warning,) = warnings
        checkpoints = {(tmp_path / "run" / "checkpoints" / name).resolve() for name in ("best", "last")}
        rows_missing = f"still missing: {STEPS + EPOCHS + 1} rows and"
        with_picture, without = (
            f"{rows_missing} {n} file{'s' * (n != 1)};" for n in (len(checkpoints) + 1, len(checkpoints))
        )
        # The picture comes before the first row, at which wandb gets stuck: it has been delivered if wandb was open.
        opened = "has not opened" not in warning
        assert opened or with_picture in warning, warning
        assert not opened or fault == "tracker-blocks", warning
        assert with_picture in warning or without in warning, warning


def test_a_stuck_tracker_does_not_delay_an_interruption(start: Start, tmp_path: Path) -> None:
    """Row 21: a stuck wandb does not use up a launcher's grace period."""
    began = time.monotonic()
    job = start(tmp_path / "run", "tracking=offline", faults="0:4:term 0:0:tracker-blocks")
    assert job.wait(60) == [INTERRUPTED]
    assert status(tmp_path / "run")["state"] == "interrupted"
    assert time.monotonic() - began < 50


def test_no_secret_reaches_a_file(start: Start, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Row 27: no file of the run folder contains wandb's key or a value that an override takes from the environment."""
    key, weights = "0123456789" * 4, tmp_path / "canary-e1f5.safetensors"
    shutil.copy(undisturbed(1) / "checkpoints" / "last" / "model.safetensors", weights)
    options = ("tracking=offline", "init_weights=${oc.env:PRIVATE}", "epochs=1")
    job = start(tmp_path / "run", *options, variables={"WANDB_API_KEY": key, "PRIVATE": str(weights)})
    assert job.wait() == [0], job.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert "init_weights: ${oc.env:PRIVATE}" in (tmp_path / "run" / "config.yaml").read_text()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    for secret in (key, "canary"):
        assert [file for file in files if secret.encode() in file.read_bytes()] == []
