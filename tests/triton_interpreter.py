"""Running tests of Triton kernels without a GPU, in Triton's interpreter, which is based on numpy."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch's CPU builds do not include triton"
)


def run_interpreted(file: str, *options: str) -> None:
    """Run a test file in a subprocess, because Triton chooses its interpreter on import."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file, *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
