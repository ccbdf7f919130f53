"""A description of the software, devices and code of a run."""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "wandb", "nvidia-dali-cuda130", "numpy", "pillow")


def describe_environment() -> dict[str, Any]:
    """Return the versions of Python and packages, the devices, the command and the state of the git repository."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [platform.processor()],
        "git": {"commit": _git("rev-parse", "HEAD").strip(), "diff": _git("diff", "HEAD")},
    }


def code_fingerprint() -> str:
    """Return a hash of the package's source files and the version of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """Return the output of git in the code's folder; it is empty without a repository or without git."""
    folder = Path(__file__).parent
    try:
        # Fails if the package is installed within another project's repository.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, capture_output=True, check=True)
        output = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return output.decode(errors="replace")  # a diff can contain files in any encoding
