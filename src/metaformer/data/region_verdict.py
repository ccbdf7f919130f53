"""Whether a GPU decodes regions of JPEGs, found out once for a GPU and the installed DALI, and remembered."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from metaformer.files import cache_folder, write_text_whole

WORKS = "works"
TIMEOUT = 120.0  # seconds; the check takes a few
PACKAGES = re.compile(r"nvidia[-_](dali|nvimgcodec)[-_]cu")


def gpu_decodes_regions(gpu: int, name: str) -> bool:
    """The verdict on a GPU: the remembered one, or that of `region_check`.

    Args:
        gpu: its number.
        name: its model.
    """
    return remembered(_file(name), [sys.executable, "-m", "metaformer.data.region_check", str(gpu)])


def remembered(file: Path, command: Sequence[str], timeout: float = TIMEOUT) -> bool:
    """Whether `file` says that regions work; it is written by what becomes of `command`, where it is not there yet."""
    try:
        verdict = file.read_text()
    except OSError:
        verdict = judge(command, timeout)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_whole(file, verdict)
        except OSError:  # read-only or full: the next start checks again
            return verdict == WORKS
    return verdict == WORKS


def judge(command: Sequence[str], timeout: float = TIMEOUT) -> str:
    """WORKS if the program ends with exit code 0, else why regions cannot be relied on; its output is not shown."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout:g} s"
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    return f"ended with exit code {done.returncode}" if done.returncode else WORKS


def _file(name: str) -> Path:
    """Of the user's cache folder, named by the GPU's model and the versions of what decodes."""
    installed = [(str(package.metadata["Name"]), package.version) for package in importlib.metadata.distributions()]
    versions = sorted({f"{package} {version}" for package, version in installed if PACKAGES.match(package.lower())})
    return cache_folder() / f"region-decode {re.sub(r'[^A-Za-z0-9.]+', '-', ' '.join([name, *versions]))}.txt"
