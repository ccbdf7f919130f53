"""Test the line of a run that says what it waited for: the disk, augmentation, or nothing but the network."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, REPOSITORY, launch

Run = Callable[..., dict[str, Any]]


def verdicts(run_dir: Path) -> list[str]:
    lines = (run_dir / "log.txt").read_text().splitlines()
    return [line for line in lines if "input-bound" in line or "compute-bound" in line]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_slow_disk(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files that open 50 ms slower, the run waits for reading; the advice is more workers, or packed images."""
    library = tmp_path / "slow.so"
    source = str(REPOSITORY / "benchmarks" / "slow_open.c")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", str(library), "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("SLOW_OPEN_FOLDER", str(images / "train"))
    monkeypatch.setenv("SLOW_OPEN_MICROSECONDS", "50000")
    run_dir = tmp_path / "run"
    done = launch(
        "train",
        *QUICK,
        f"data.root={images}",
        f"run_dir={run_dir}",
        "model=timm",
        "model.name=test_resnet",
        "model.drop_path_rate=null",
        "epochs=2",
        fresh=True,
    )
    assert done.code == 0, done.stderr
    line = verdicts(run_dir)[-1]
    assert " input-bound: " in line
    assert "(reading files " in line
    assert "for reading files, raise workers (now 1;" in line
    assert "--format shards" in line


def test_heavy_augmentation(images: Path, tmp_path: Path, run_program: Run) -> None:
    """With 100 operations per image, the run waits for augmentation."""
    heavy = ("augmentation.randaugment.num_ops=100", "augmentation.randaugment.probability=1", "workers=0")
    run_program("train", *QUICK, f"data.root={images}", f"run_dir={tmp_path}", *heavy, "epochs=1")
    (line,) = verdicts(tmp_path)
    assert "(augmentation " in line
    assert line.endswith(", or use augmentation=light, which is another recipe")


def test_a_slow_network(images: Path, tmp_path: Path, run_program: Run) -> None:
    """With a network that takes longer than its images, the run is compute-bound."""
    slow = ("model=poolformer_s36", "workers=0", "epochs=1")
    run_program("train", *QUICK, f"data.root={images}", f"run_dir={tmp_path}", *slow)
    (line,) = verdicts(tmp_path)
    assert " compute-bound: " in line
    assert line.endswith(" waiting for data")
