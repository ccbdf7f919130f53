"""Triton's kernels without a GPU: in its interpreter, which runs a kernel's programs one after the other in numpy."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch's builds for CPUs lack triton")
def test_interpreted_kernels_equal_the_reference() -> None:
    """All of kernel_cases.py, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/models/kernel_cases.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
