"""Harness of the benchmarks: measurements in separate processes, in alternation, with a record of the machine."""

import argparse
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from metaformer.errors import UserError
from metaformer.files import check_output, write_text_atomically

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "torchcodec", "pillow")
WIDTH = 120  # columns of a table where stdout is not a terminal
LOADED = 0.1  # share of the processors' time from which on a machine counts as loaded

Case = TypeVar("Case", bound=Hashable)


def measure(
    name: str, program: str, options: Sequence[str], environment: Mapping[str, str] | None = None, ranks: int = 0
) -> dict[str, Any]:
    """Run a measuring program in a separate process, and return the JSON object that it prints last.

    Args:
        name: name of the measurement, for error messages.
        program: a module of this package.
        ranks: processes to start with torchrun; 0 starts one without it.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, "-m", f"benchmarks.{program}", *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        errors = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        raise UserError(
            f"{name}: its process ended with exit code {done.returncode}: {errors[0].removeprefix('error: ')}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_turns(
    cases: Iterable[Case], repeats: int, take: Callable[[Case, int], dict[str, Any]]
) -> dict[Case, list[dict[str, Any]]]:
    """Measure every case once before any case is repeated, so that a drift of the machine's speed affects all alike.

    Args:
        take: measures a case. Its second argument is the number of the repeat, from 0. The result must contain
            `images_per_second`.
    """
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for repeat, case in itertools.product(range(repeats), found):
        found[case].append(take(case, repeat))
        title = ", ".join(case) if isinstance(case, tuple) else str(case)
        speed = found[case][-1]["images_per_second"]
        print(f"repeat {repeat + 1} of {repeats}, {title}: {speed:.1f} images/s", file=sys.stderr, flush=True)
    return found


def check_load(anyway: bool) -> float:
    """Return which share of the time of this process's processors is in use; nothing of one's own may run meanwhile.

    Args:
        anyway: return it even if the machine is loaded.

    Raises:
        UserError: the machine is loaded.
    """
    before = _processor_ticks()
    time.sleep(1)
    busy, idle = (after - earlier for after, earlier in zip(_processor_ticks(), before, strict=True))
    load = busy / max(1, busy + idle)
    if load >= LOADED and not anyway:
        raise UserError(
            f"this machine is loaded: other programs take {load:.0%} of its processors; wait until it is idle, or give "
            "--loaded to report figures all the same, marked as such"
        )
    return load


def _processor_ticks() -> tuple[int, int]:
    """Return the busy and the idle time of the processors that this process may use, in the kernel's ticks."""
    own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    ticks = [
        [int(value) for value in values[:8]] for name, *values in lines if name in own
    ]  # the others are part of them
    return sum(sum(values) - values[3] - values[4] for values in ticks), sum(values[3] + values[4] for values in ticks)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Reject options that are less than 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: must be at least 1")


def check_outputs(arguments: argparse.Namespace, *names: str) -> None:
    """Reject output files that cannot be written, before the measurement starts."""
    for name in names:
        file: Path | None = getattr(arguments, name)
        if file is not None:
            check_output(f"--{name}={file}", file)


def as_options(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Return the named arguments as command-line options of a measuring program."""
    return [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]


def write_json(file: Path | None, figures: dict[str, Any]) -> None:
    """Write figures and a description of the machine, if a file is given."""
    if file is not None:
        write_text_atomically(file, json.dumps({**_circumstances(), **figures}, indent=2) + "\n")


def console() -> Console:
    """Return a console for tables."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _circumstances() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "load_average": os.getloadavg(),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "machine": {"cpu": models[0].partition(":")[2].strip() if models else None, "cores": os.cpu_count()},
        "versions": {name: installed.get(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
