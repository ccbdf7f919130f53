"""Triton's kernels without a GPU: in its interpreter, which runs a kernel's programs one after the other in numpy."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch's builds for CPUs lack triton"
)


def run_interpreted(file: str) -> None:
    """Run a file of tests in a process of its own: Triton decides when it is imported."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
