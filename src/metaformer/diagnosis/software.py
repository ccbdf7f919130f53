"""Checks of software versions and GPUs."""

import ctypes
import importlib
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence

import torch

from metaformer.diagnosis.finding import Finding, fail, ok, warn

MIN_TORCH = (2, 11)
DALI = re.compile(r"nvidia-dali-cuda(\d+)$")


def versions() -> Iterator[Finding]:
    """Check the versions of Python, torch and the packages that depend on it."""
    yield ok("python", platform.python_version())
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    number = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if number < MIN_TORCH:
        minimum = ".".join(map(str, MIN_TORCH))
        yield fail("torch", f"{torch.__version__}, for {built_for}", f"install torch {minimum} or newer")
    else:
        yield ok("torch", f"{torch.__version__}, for {built_for}")
    for name in ("torchvision", "timm"):
        try:
            module = importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
            reason = str(error).splitlines()[0]
            yield fail(name, f"cannot be imported ({reason})", "install the versions in requirements.txt with uv")
        else:
            yield ok(name, module.__version__)
    yield _dali(torch.cuda.is_available())
    yield _apex()


def _dali(gpu: bool) -> Finding:
    names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
    found = next((match for name in names if name and (match := DALI.match(name.lower()))), None)
    install = "`uv pip install nvidia-dali-cuda130`"
    if found is None:
        message = "not installed; loader=torch decodes instead"
        return warn("dali", message, install) if gpu else ok("dali", message)
    try:
        importlib.import_module("nvidia.dali.plugin.pytorch")
    except (ImportError, OSError) as error:
        return fail("dali", f"cannot be imported ({str(error).splitlines()[0]})", f"reinstall it: {install}")
    version = importlib.metadata.version(found[0])
    cuda = (torch.version.cuda or "").split(".")[0]
    if gpu and not found[1].startswith(cuda):
        return fail(
            "dali", f"{version} is for CUDA {found[1]}, but torch is for {cuda}", f"install nvidia-dali-cuda{cuda}0"
        )
    return ok("dali", f"{version}, {found[0]}")


def _apex() -> Finding:
    try:
        importlib.import_module("apex.optimizers")
    except ImportError:
        return ok("apex", "not installed; the default, optimizer.implementation=torch, does not need it")
    return ok("apex", "installed: optimizer.implementation=apex works")


def gpus(expect_gpu: bool) -> Iterator[Finding]:
    """Check the driver, the GPUs, NCCL, and the links between the GPUs.

    Args:
        expect_gpu: warn if there is no GPU.
    """
    driver = driver_version()
    count = torch.cuda.device_count()
    if count == 0:
        if driver is not None:
            newest = ".".join(map(str, driver))
            fix = "install a torch for this driver, or a newer driver; start a container with --gpus=all"
            yield fail("gpu", f"there is a driver for CUDA {newest} or older, but torch sees no GPU", fix)
        elif expect_gpu:
            yield warn("gpu", "no GPU: training runs on the CPU, with gloo", "use a node with a GPU, or add --cpu")
        else:
            yield ok("gpu", "no GPU, as expected with --cpu")
        return
    assert driver is not None
    yield _driver(driver)
    yield ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    models = {torch.cuda.get_device_name(index) for index in range(count)}
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(count))
    yield ok("gpu", f"{count} x {' and '.join(sorted(models))}, {memory / 2**30:.0f} GiB each at least")
    if count > 1:
        topology = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False).stdout
        yield links(count, topology)


def _driver(driver: Sequence[int]) -> Finding:
    built = [int(part) for part in str(torch.version.cuda).split(".")]
    message = f"for CUDA {'.'.join(map(str, driver))} or older; torch is for {torch.version.cuda}"
    if driver[0] < built[0]:
        return fail("driver", message, "update the driver, or install a torch for its CUDA version")
    return ok("driver", message)


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver supports, or None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def links(count: int, topology: str) -> Finding:
    """Check the links between the GPUs.

    Args:
        count: number of GPUs.
        topology: the output of `nvidia-smi topo -m`, a matrix with NV# for NVLink and PIX to SYS for paths over PCIe.
    """
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line) and "X" in line.split()]
    kinds = {row[1 + other] for row in rows for other in range(count) if len(row) > count} - {"X"}
    if not kinds:
        return warn("links", "unknown: nvidia-smi topo -m prints nothing", "check that nvidia-smi is on the PATH")
    if all(kind.startswith("NV") for kind in kinds):
        return ok("links", f"NVLink between all GPUs ({', '.join(sorted(kinds))})")
    if kinds & {"SYS", "NODE", "PHB"}:
        slow = ", ".join(sorted(kinds))
        return warn(
            "links",
            f"{slow}: some pairs communicate through the host",
            "expect slower all-reduces; check the bandwidth",
        )
    return ok("links", f"over PCIe switches ({', '.join(sorted(kinds))})")
