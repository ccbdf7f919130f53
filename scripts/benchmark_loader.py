"""How fast each loader reads a folder of images, beside timm's and torchvision's, and what it costs.

  python scripts/benchmark_loader.py /path/to/imagenet/val
  python scripts/benchmark_loader.py /path/to/imagenet-shards/val    # this project's loaders: the others read folders
  python scripts/benchmark_loader.py /path/to/imagenet/val --open-latency-ms 5 --only torch timm --json loaders.json

Three jobs at 224 px: training with crop and flip, the same with RandAugment, and evaluation at crop .9. Each
measurement runs in a process of its own (measure_loader.py), repeat r of all before repeat r + 1. Two batches a worker
are read before the counted ones and two after them: workers start, and finish, outside of the window. Every file is
read once before the first measurement, so that all find it in the page cache.

This project's loaders give uint8 images, which the training loop normalises on the device; timm's (without its
prefetcher, which needs a GPU) and torchvision's give normalised float32, made by their workers.

Images/s: median of the repeats, lowest and highest. CPU: user and system time of the process and its workers in the
window. Memory: PSS (shared pages split among those who share them) of the same processes, the most that was seen while
the batches after the window are read: looking takes time.

--open-latency-ms makes each opening of a file below the folder take longer, for every loader alike (slow_open.c).
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pickle
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from metaformer.data.index.image_index import ImageIndex, find_images
from metaformer.data.load.dali_loader import dali_is_installed
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.errors import UserError, unknown_name
from metaformer.files import check_output, write_text_atomically
from metaformer.program import run_program

COUNTS = ("images", "batch", "workers", "repeats")
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "pillow")
LOADERS = ("torch", "pil", "dali", "timm", "torchvision")
OF_FOLDERS = ("timm", "torchvision")  # read no shards
JOBS = {  # options of measure_loader.py
    "training, crop and flip": ["--training"],
    "training, RandAugment": ["--training", "--randaugment"],
    "evaluation, crop .9": [],
}


class Measurement(NamedTuple):
    """One loader on one job, once."""

    images_per_second: float
    cpu_ms: float  # of all cores, an image
    memory_mib: float


def main() -> None:
    """Measure, print a table for each job, and write the figures."""
    arguments = _parse()
    loaders = _chosen_loaders(arguments.only)
    index = _indexed(arguments)
    if index.shards is not None:
        loaders = _without_those_of_folders(loaders, arguments)
    _fill_page_cache(index)
    circumstances = _circumstances()
    with tempfile.TemporaryDirectory() as temporary:
        found = _measure_all(arguments, loaders, index, Path(temporary))
    jobs = {title: _summary(title, loaders, found) for title in JOBS}
    _print(jobs)
    if arguments.json is not None:
        settings = {name: getattr(arguments, name) for name in (*COUNTS, "open_latency_ms")}
        write_text_atomically(arguments.json, json.dumps({**circumstances, **settings, "jobs": jobs}, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds class folders of images, or shards")
    parser.add_argument("--images", type=int, default=1536, help="counted in each measurement, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=64)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="worker processes, or DALI's threads (all cores)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--open-latency-ms", type=float, default=0.0, metavar="MS", help="simulate slow storage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(LOADERS)}")
    arguments = parser.parse_args()
    for name in COUNTS:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)}: must be at least 1")
    if arguments.open_latency_ms < 0:
        raise UserError(f"--open-latency-ms={arguments.open_latency_ms:g}: must not be negative")
    if arguments.images % arguments.batch:
        raise UserError(f"--images={arguments.images}: must be a multiple of --batch={arguments.batch}")
    if arguments.json is not None:
        check_output(f"--json={arguments.json}", arguments.json)
    return arguments


def _chosen_loaders(only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in LOADERS:
            raise unknown_name("--only", name, LOADERS)
    return [name for name in LOADERS if (name in only if only else name != "dali" or dali_is_installed())]


def _without_those_of_folders(loaders: list[str], arguments: argparse.Namespace) -> list[str]:
    missing = ", ".join(name for name in loaders if name in OF_FOLDERS)
    if missing and arguments.only:
        raise UserError(f"--only: {missing} read no shards, which {arguments.folder} holds; give the folder of images")
    if missing:
        print(f"{arguments.folder} holds shards: {missing} left out, they read folders only", file=sys.stderr)
    return [name for name in loaders if name not in OF_FOLDERS]


def _indexed(arguments: argparse.Namespace) -> ImageIndex:
    """As many images as a measurement reads, evenly spread; where the folder has fewer, some come again."""
    index = find_images(arguments.folder.absolute())
    if index.classes == (".",):
        raise UserError(f"{arguments.folder}: images lie in it without class folders; give the folder that holds them")
    count = arguments.images + 2 * _uncounted_batches(arguments) * arguments.batch
    return index.select(np.arange(count, dtype=np.int64) * len(index) // count)


def _fill_page_cache(index: ImageIndex) -> None:
    with closing(ImageBytes(index)) as stored:
        for sample in range(len(index)):
            try:
                stored.read(sample)
            except OSError as error:
                raise UserError(
                    f"{index.location(sample)}: cannot be read ({error}); mend or remove the file"
                ) from error


def _uncounted_batches(arguments: argparse.Namespace) -> int:
    """Before the window, and as many after it."""
    return 2 * int(arguments.workers)


def _measure_all(
    arguments: argparse.Namespace, loaders: list[str], index: ImageIndex, temporary: Path
) -> dict[tuple[str, str], list[Measurement]]:
    """The repeats of each job and loader."""
    environment = _environment(arguments, temporary)
    images = temporary / "index.pickle"
    images.write_bytes(pickle.dumps(index))
    command = [sys.executable, str(Path(__file__).with_name("measure_loader.py")), str(images)]
    command += [f"--batch={arguments.batch}", f"--workers={arguments.workers}"]
    command += [f"--uncounted-batches={_uncounted_batches(arguments)}"]
    found: dict[tuple[str, str], list[Measurement]] = {key: [] for key in itertools.product(JOBS, loaders)}
    for repeat, (title, loader) in itertools.product(range(arguments.repeats), found):
        measured = _measure(loader, [*command, *JOBS[title]], environment)
        found[title, loader].append(measured)
        done = f"repeat {repeat + 1} of {arguments.repeats}, {title}, {loader}"
        print(f"{done}: {measured.images_per_second:.0f} images/s", file=sys.stderr, flush=True)
    return found


def _measure(loader: str, command: list[str], environment: dict[str, str]) -> Measurement:
    """One measurement, in a new process."""
    options = [*command, f"--loader={loader}"]
    done = subprocess.run(options, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "nothing on stderr").splitlines()[-1].removeprefix("error: ")
        raise UserError(f"{loader}: its process ended with exit code {done.returncode}: {last}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _environment(arguments: argparse.Namespace, temporary: Path) -> dict[str, str]:
    """Of the measuring processes, with the library that slows openings down where that is asked for."""
    environment = dict(os.environ)
    if arguments.open_latency_ms:
        library = temporary / "slow_open.so"
        source = Path(__file__).with_name("slow_open.c")
        try:
            subprocess.run(
                ["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise UserError("--open-latency-ms: needs a C compiler, and there is no `cc`; install gcc") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"--open-latency-ms: cc failed: {' '.join(error.stderr.split())[:300]}") from error
        environment["LD_PRELOAD"] = ":".join(filter(None, [str(library), environment.get("LD_PRELOAD")]))
        environment["SLOW_OPEN_FOLDER"] = str(arguments.folder.absolute())
        environment["SLOW_OPEN_MICROSECONDS"] = str(round(1000 * arguments.open_latency_ms))
    return environment


def _summary(
    title: str, loaders: list[str], found: dict[tuple[str, str], list[Measurement]]
) -> dict[str, dict[str, Any]]:
    """Loader to figures, for one job."""
    speeds = {loader: [m.images_per_second for m in found[title, loader]] for loader in loaders}
    reference = statistics.median(speeds["timm"]) if "timm" in speeds else None
    return {
        loader: {
            "images_per_second": {"median": statistics.median(values), "min": min(values), "max": max(values)},
            "cpu_ms_per_image": statistics.median(m.cpu_ms for m in found[title, loader]),
            "peak_memory_mib": max(m.memory_mib for m in found[title, loader]),
            "ratio_to_timm": None if reference is None else statistics.median(values) / reference,
        }
        for loader, values in speeds.items()
    }


def _print(jobs: dict[str, dict[str, dict[str, Any]]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, rows in jobs.items():
        table = Table(
            "loader", "images/s", "lowest to highest", "of timm", "CPU ms an image", "memory MiB", title=title
        )
        for loader, row in rows.items():
            speed, ratio = row["images_per_second"], row["ratio_to_timm"]
            speeds = (f"{speed['median']:.0f}", f"{speed['min']:.0f} to {speed['max']:.0f}")
            costs = (f"{row['cpu_ms_per_image']:.2f}", f"{row['peak_memory_mib']:.0f}")
            table.add_row(loader, *speeds, "-" if ratio is None else f"{ratio:.2f}", *costs)
        console.print(table)


def _circumstances() -> dict[str, Any]:
    """Where, when, with what and how it was measured."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "load_average": os.getloadavg(),
        "machine": {"cpu": models[0].partition(":")[2].strip() if models else None, "cores": os.cpu_count()},
        "versions": {name: installed.get(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    """Of the repository that this script lies in; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    run_program(main)
