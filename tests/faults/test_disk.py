"""Test runs on damaged, missing, full, read-only, shared or hostile files."""

import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metaformer.training.manifest import read_manifest, write_manifest
from tests.conftest import rows
from tests.faults.conftest import STEPS, Run, Start, assert_same_run, status, wait_for_steps

Undisturbed = Callable[[int], Path]


def damage(file: Path, how: str) -> None:
    """Truncate a file, or flip a bit in its middle."""
    content = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer.pt", "manifest.json"])
def test_a_damaged_last_checkpoint(
    start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path, how: str, name: str
) -> None:
    """Row 5: the previous checkpoint is used, the log says which was skipped and why, and the result is the same."""
    assert start(tmp_path / "run", faults="0:9:term").wait() == [75]
    last = (tmp_path / "run" / "checkpoints" / "last").resolve()
    damage(last / name, how)
    run(tmp_path / "run")
    assert f"{last / name}: damaged" in (tmp_path / "run" / "log.txt").read_text()
    assert status(tmp_path / "run")["started_at_step"] < 9
    assert_same_run(tmp_path / "run", undisturbed(1))


def test_all_checkpoints_damaged(start: Start, tmp_path: Path) -> None:
    """Row 6: a run does not silently start over: exit code 2, every damaged file named, nothing changed."""
    assert start(tmp_path / "run", faults="0:9:term").wait() == [75]
    checkpoints = sorted(folder for folder in (tmp_path / "run" / "checkpoints").iterdir() if not folder.is_symlink())
    for folder in checkpoints:
        damage(folder / "trainer.pt", "flip")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    job = start(tmp_path / "run")
    assert job.wait() == [2]
    assert all(str(folder / "trainer.pt") in job.errors[0] for folder in checkpoints)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(start: Start, run: Run, small_disk: Path, tmp_path: Path) -> None:
    """Row 7: training continues with alarms, the old checkpoint stays intact, and the third failed save ends it."""
    run_dir, filler = small_disk / "run", small_disk / "filler"
    job = start(run_dir, faults="0:0:slow")
    wait_for_steps(run_dir, 4)
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2**23))
    full_at = len(rows(run_dir))
    assert job.wait() == [2], job.stderr
    assert "nor could the 2 before it; free some space" in job.errors[0]
    assert "No space left on device" in job.errors[0] or "is the disk full?" in job.errors[0]
    out = (tmp_path / f"{job.log.name}-0.out").read_text()
    assert out.count("ALARM") == 2
    assert re.search(rf"^ +\d+/\d+ +{full_at + 3} ", out, re.MULTILINE), "training must continue meanwhile"
    assert int((run_dir / "checkpoints" / "last").resolve().name.split("-")[1]) <= full_at + 1
    filler.unlink()
    run(run_dir)
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1)), "no row may be doubled or missing"


def test_a_disk_that_is_full_at_the_start(start: Start, small_disk: Path) -> None:
    """Row 8: a full disk is an error before the first step."""
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(2**23))
    job = start(small_disk / "run")
    assert job.wait() == [2]
    assert "cannot be written (No space left on device)" in job.errors[0]
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize("how", ["read-only", "dangling link"])
def test_a_run_folder_that_cannot_be_written(start: Start, small_disk: Path, how: str) -> None:
    """Row 8: a run folder that cannot be written is an error before the first step, with exit code 2."""
    run_dir = small_disk / "run"
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    else:
        run_dir.symlink_to(small_disk / "nowhere")
    job = start(run_dir)
    assert job.wait() == [2]
    assert f"run_dir={run_dir}: cannot be" in job.errors[0]


def test_a_run_folder_that_vanishes(start: Start, tmp_path: Path) -> None:
    """Row 8: a folder that vanishes is not recreated; training continues and ends after three failed saves."""
    job = start(tmp_path / "run", faults="0:0:slow")
    wait_for_steps(tmp_path / "run", 3)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert job.wait() == [2]
    assert "cannot be written (No such file or directory)" in job.errors[0]
    assert not (tmp_path / "run").exists()


def test_the_data_set_changes(images: Path, start: Start, tmp_path: Path) -> None:
    """Row 19: a run does not resume on a data set that has changed."""
    shutil.copytree(images, tmp_path / "data", ignore=shutil.ignore_patterns(".metaformer"))
    root = f"data.root={tmp_path / 'data'}"
    assert start(tmp_path / "run", root, faults="0:4:term").wait() == [75]
    first = next((tmp_path / "data" / "train" / "class_0").iterdir())
    shutil.copy(first, first.with_name("more.JPEG"))
    job = start(tmp_path / "run", root)
    assert job.wait() == [2]
    assert "cannot resume: it was trained with data=" in job.errors[0]


def test_two_runs_in_one_folder(start: Start, run: Run, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Row 28: a second run is refused while the first is alive; a killed run leaves no lock."""
    first = start(tmp_path / "run", faults="0:0:slow")
    wait_for_steps(tmp_path / "run", 3)
    first.signal(0, signal.SIGSTOP)  # keeps it alive but unfinished until the second has started
    second = start(tmp_path / "run")
    assert second.wait() == [2]
    assert f"process {first.processes[0].pid} on " in second.errors[0]
    first.end()
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed(1))


class Canary:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._file}",)


@pytest.mark.parametrize("where", ["checkpoint", "weights", "state"])
def test_code_in_a_file_is_not_run(start: Start, tmp_path: Path, where: str) -> None:
    """Row 24: malicious pickles are not executed, as init_weights or as checkpoint files with a valid manifest."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    canary.unlink()  # pickle itself does execute it
    assert start(tmp_path / "run", faults="0:4:term").wait() == [75]
    hostile = tmp_path / "hostile.pth"
    torch.save({"state_dict": Canary(canary), "optimizer": Canary(canary)}, hostile)
    options = {"weights": (f"init_weights={hostile}", f"run_dir={tmp_path / 'other'}"), "state": (), "checkpoint": ()}
    if where != "weights":
        last = (tmp_path / "run" / "checkpoints" / "last").resolve()
        target = last / ("trainer.pt" if where == "state" else "model.safetensors")
        shutil.copy(hostile, target)
        facts = read_manifest(last)
        (last / "manifest.json").unlink()
        write_manifest(last, {name: facts[name] for name in ("model", "identity", "progress")})
    job = start(tmp_path / "run", *options[where])
    assert job.wait() == [2]
    assert len(job.errors) == 1
    assert not canary.exists()


@pytest.mark.parametrize("override", ["+model._target_=os.system", "model={_target_:os.system,name:x}"])
def test_a_configuration_cannot_name_code(start: Start, tmp_path: Path, override: str) -> None:
    """Row 25: a configuration that names a callable is refused.

    Row 26, tar members that point outside the archive: tests/data/prepare/test_imagenet_archives.py.
    """
    job = start(tmp_path / "run", override)
    assert job.wait() == [2]
    assert "_target_" in job.errors[0]
    assert not (tmp_path / "run").exists()
