"""Test gpu_check.sh without a GPU, with real tests and measurements of small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow  # several minutes: a dozen processes that import torch
def test_rehearsal_without_a_gpu(images: Path, tmp_path: Path) -> None:
    """All parts but the GPU kernels run, with the plain network; each has a line in the summary and figures as JSON."""
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), str(tmp_path / "out"), str(images / "train")]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    assert done.returncode == 0, done.stdout
    states = {line.split()[1].rstrip(":"): line.split()[0] for line in summary.splitlines()[4:]}
    assert states.pop("kernels") == "skipped"
    states.pop("DALI", None)
    assert states == dict.fromkeys(("operators", "fused", "train", "inference", "jpegs", "loader"), "ok")
    for name in ("train", "inference", "jpegs"):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert found["variants"]["eager"]["step_seconds"] > 0
    assert (tmp_path / "out" / "loader.json").exists()
    assert (tmp_path / "out" / "train.png").exists()


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2), (["--out"], 2)])
def test_help_makes_no_folder(tmp_path: Path, arguments: list[str], code: int) -> None:
    """--help, no argument and an unknown option print the usage, and create nothing."""
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert "scripts/gpu_check.sh OUT_FOLDER [IMAGE_FOLDER]" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_fails(tmp_path: Path) -> None:
    """Parts that end with exit code 3 are listed with that code, and the script exits with 1."""
    (tmp_path / "empty").mkdir()
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *"-m pytest"*|*benchmark*) exit 3;; *) exec {sys.executable} "$@";; esac\n'
    )
    fake.chmod(0o755)
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), str(tmp_path / "out"), str(tmp_path / "empty")]
    environment = os.environ | {"PYTHON": str(fake), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "failed   train (exit code 3; see train.log)" in done.stdout


@pytest.mark.parametrize("module", ["hydra", "torchvision"])
def test_a_package_that_is_missing(tmp_path: Path, module: str) -> None:
    """A package that cannot be installed, or is required beforehand, gives a one-line error; nothing is measured."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name: None if name == '{module}' else find(name)\n"
        f"sys.modules['{module}'] = None\n"
    )
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in "-m pip"*|"-m venv"*) exit 1;; *) exec {sys.executable} "$@";; esac\n')
    fake.chmod(0o755)
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHON": str(fake), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    expected = {
        "hydra": f"error: cannot install the missing packages (see {tmp_path}/out/install.log): hydra-core==1.3.8",
        "torchvision": f"error: {fake} cannot import torchvision; set PYTHON to an interpreter that can",
    }
    assert line == expected[module]
    assert not (tmp_path / "out" / "summary.txt").exists()
