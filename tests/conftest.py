"""Fixtures and helpers for all tests: a small data set of real JPEGs, and running the programs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import train
import validate
from tests.warm import python

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may be started, ignores it

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CLASSES, TRAIN_IMAGES, VAL_IMAGES = 4, 48, 155

# Tests below these folders run whole programs: `make test` leaves them out, `make test-all` runs them.
WHOLE = ("benchmarks", "end_to_end", "faults", "scripts", "slurm")

# A recipe that trains in seconds, with all random augmentations on.
QUICK = (
    "image_size=32",
    "precision=fp32",
    "global_batch_size=8",
    "eval_batch_size=32",
    "workers=1",
    "tracking=local",
    "report.enabled=false",
    "log_every_steps=1",
    "schedule.warmup_epochs=1",
    "schedule.cooldown_epochs=0",
    "optimizer.lr=1e-3",
)

# A network of two blocks, where a test is about something else.
SMALL_NETWORK = ("model=metaformer", "model.depths=[1,1]", "model.dims=[8,16]")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run whole programs."""
    for item in items:
        if item.path.relative_to(REPOSITORY / "tests").parts[0] in WHOLE:
            item.add_marker(pytest.mark.whole)


@dataclass
class Finished:
    """The exit code and output of a program."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        found: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return found

    @property
    def errors(self) -> list[str]:
        """The program's error lines."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 155 validation JPEGs in 4 classes, distinguishable by colour and stripes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for number in range(count):
            label = number % CLASSES
            height, width = rng.integers(34, 60, 2)
            pixels = rng.integers(0, 80, (height, width, 3))
            pixels[..., label % 3] += 100
            if label == 3:
                pixels[::4] += 75
            file = root / split / f"class_{label}" / f"{number:03}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file, format="JPEG")
    return root


def link_fewer_validation_images(images: Path, root: Path, per_class: int) -> Path:
    """Fill `root` with links to the training images and the first validation images of each class; return it."""
    (root / "train").symlink_to(images / "train")
    for folder in (images / "val").iterdir():
        (root / "val" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:per_class]:
            (root / "val" / folder.name / image.name).symlink_to(image)
    return root


@pytest.fixture
def run_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """A function that runs main() of train.py or validate.py in this process and returns the printed result."""

    def run(program: str, *overrides: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *overrides])
        {"train": train.main, "validate": validate.main}[program]()
        return Finished(0, capsys.readouterr().out, "").result

    return run


def launch(program: str, *overrides: str, ranks: int = 1, timeout: float = 180, fresh: bool = False) -> Finished:
    """Run a program in subprocesses: with `python` for one rank, with torchrun for more.

    Args:
        fresh: Start real interpreters, not those of tests/warm, so that /proc shows each process as a user's.
    """
    interpreter = sys.executable if fresh else python()
    command = [interpreter, str(REPOSITORY / f"{program}.py"), *overrides]
    if ranks > 1:
        torchrun = [interpreter, str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={ranks}", "--no-python"]
        command = [*torchrun, *command]
    return _finish(command, timeout)


def launch_module(name: str, *arguments: str, timeout: float = 280) -> Finished:
    """Run a module of this repository like `python -m`."""
    return _finish([python(), "-m", name, *arguments], timeout)


def _finish(command: list[str], timeout: float) -> Finished:
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def rows(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the rows of one kind from a run's metrics, without figures that vary between equal runs."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    varying = ("images_per_second", "data_wait", "memory_gib")
    return [{k: v for k, v in row.items() if k not in varying} for row in lines if row["kind"] == kind]
