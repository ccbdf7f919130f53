"""Versions that must fit each other, and the GPUs."""

import ctypes
import importlib
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence

import torch

from metaformer.diagnosis.finding import Finding, fail, ok, warn

LEAST_TORCH = (2, 11)
DALI = re.compile(r"nvidia-dali-cuda(\d+)$")


def versions() -> Iterator[Finding]:
    """Python, torch and what is built against it."""
    yield ok("python", platform.python_version())
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    number = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if number < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        yield fail("torch", f"{torch.__version__}, for {built_for}", f"install torch {least} or newer")
    else:
        yield ok("torch", f"{torch.__version__}, for {built_for}")
    for name in ("torchvision", "timm"):
        try:
            module = importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
            reason = str(error).splitlines()[0]
            yield fail(name, f"cannot be imported ({reason})", "install the versions of requirements.txt, with uv")
        else:
            yield ok(name, module.__version__)
    yield _dali(torch.cuda.is_available())
    yield _apex()


def _dali(gpu: bool) -> Finding:
    names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
    found = next((match for name in names if name and (match := DALI.match(name.lower()))), None)
    install = "`uv pip install nvidia-dali-cuda130`"
    if found is None:
        said = "not installed: loader=torch decodes"
        return warn("dali", said, install) if gpu else ok("dali", said)
    try:
        importlib.import_module("nvidia.dali.plugin.pytorch")
    except (ImportError, OSError) as error:
        return fail("dali", f"cannot be imported ({str(error).splitlines()[0]})", f"install it anew: {install}")
    version = importlib.metadata.version(found[0])
    cuda = (torch.version.cuda or "").split(".")[0]
    if gpu and not found[1].startswith(cuda):
        return fail("dali", f"{version} is for CUDA {found[1]}, torch for {cuda}", f"install nvidia-dali-cuda{cuda}0")
    return ok("dali", f"{version}, {found[0]}")


def _apex() -> Finding:
    try:
        importlib.import_module("apex.optimizers")
    except ImportError:
        return ok("apex", "not installed: optimizer.implementation=torch, the default, needs none")
    return ok("apex", "installed: optimizer.implementation=apex works")


def gpus(expect_gpu: bool) -> Iterator[Finding]:
    """The driver, the GPUs, NCCL, and how the GPUs are linked.

    Args:
        expect_gpu: whether a machine without one is not as it should be.
    """
    driver = driver_version()
    count = torch.cuda.device_count()
    if count == 0:
        if driver is not None:
            at_most = ".".join(map(str, driver))
            mend = "install a torch for this driver, or a newer driver; in a container, start it with --gpus=all"
            yield fail("gpu", f"a driver for CUDA {at_most} or older is there, but torch sees no GPU", mend)
        elif expect_gpu:
            yield warn("gpu", "no GPU: training runs on the CPU, with gloo", "go to a node that has one, or add --cpu")
        else:
            yield ok("gpu", "no GPU, as --cpu says")
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
    said = f"for CUDA {'.'.join(map(str, driver))} or older; torch is for {torch.version.cuda}"
    if driver[0] < built[0]:
        return fail("driver", said, "update the driver, or install a torch for its CUDA")
    return ok("driver", said)


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver can run; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def links(count: int, topology: str) -> Finding:
    """How the GPUs reach each other.

    Args:
        topology: what `nvidia-smi topo -m` prints: a matrix, NV# for NVLink, PIX to SYS for ways over PCIe.
    """
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s", line) and "X" in line.split()]
    kinds = {row[1 + other] for row in rows for other in range(count) if len(row) > count} - {"X"}
    if not kinds:
        return warn("links", "unknown: nvidia-smi topo -m says nothing", "see that nvidia-smi is on the path")
    if all(kind.startswith("NV") for kind in kinds):
        return ok("links", f"NVLink between all GPUs ({', '.join(sorted(kinds))})")
    if kinds & {"SYS", "NODE", "PHB"}:
        slow = ", ".join(sorted(kinds))
        return warn(
            "links", f"{slow}: some pairs talk through the host", "expect slower all-reduces; see the bandwidth"
        )
    return ok("links", f"over PCIe switches ({', '.join(sorted(kinds))})")
