"""Measure the speed, CPU time and memory of each loader on a folder of images, next to timm's and torchvision's.

  python -m benchmarks.loader /path/to/imagenet/val
  python -m benchmarks.loader /path/to/imagenet-shards/val    # this project's loaders only: the others need folders
  python -m benchmarks.loader /path/to/imagenet/val --open-latency-ms 5 --only torch timm --json loaders.json

There are three jobs at 224 px: training with crop and flip, the same with RandAugment, and evaluation at crop .9. Each
measurement runs in a separate process (measure_loader.py), and the loaders alternate. Two batches per worker are read
before the counted ones and two after them, so that workers start and finish outside the measured window. Every file
is read once before the first measurement, so that all loaders find it in the page cache.

This project's loaders return uint8 images, which the training loop normalises on the device. timm's loader (without its
prefetcher, which needs a GPU) and torchvision's return float32 images that their workers have normalised.

Images/s: median, minimum and maximum of the repeats. CPU: user and system time of the process and its workers in the
window. Memory: peak PSS (shared pages are divided among their users) of the same processes, sampled while the batches
after the window are read, because sampling takes time.

--open-latency-ms delays each opening of a file in the folder, for every loader alike (slow_open.c).
"""

import argparse
import itertools
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.harness import as_options, by_turns, check_counts, check_outputs, console, measure, spread, write_json
from metaformer.data.index.image_index import ImageIndex, find_images
from metaformer.data.load.dali_loader import dali_is_installed
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.errors import UserError, unknown_name
from metaformer.program import run_program

COUNTS = ("images", "batch", "workers", "repeats")
LOADERS = ("torch", "pil", "dali", "timm", "torchvision")
READ_FOLDERS_ONLY = ("timm", "torchvision")
JOBS = {  # name: options of measure_loader.py
    "training, crop and flip": ["--training"],
    "training, RandAugment": ["--training", "--randaugment"],
    "evaluation, crop .9": [],
}


def main() -> None:
    """Measure, print a table for each job, and write the figures."""
    arguments = _parse()
    loaders = _select_loaders(arguments.only)
    index = _select_images(arguments)
    if index.shards is not None:
        loaders = _without_folder_loaders(loaders, arguments)
    _fill_page_cache(index)
    with tempfile.TemporaryDirectory() as temporary:
        found = _measure_all(arguments, loaders, index, Path(temporary))
    jobs = {title: _summary(title, loaders, found) for title in JOBS}
    _print(jobs)
    settings = {name: getattr(arguments, name) for name in (*COUNTS, "open_latency_ms")}
    write_json(arguments.json, {**settings, "jobs": jobs})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with class folders of images, or with shards")
    parser.add_argument(
        "--images", type=int, default=1536, help="counted images of a measurement, a multiple of --batch"
    )
    parser.add_argument("--batch", type=int, default=64)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="worker processes, or DALI's threads (all cores)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--open-latency-ms", type=float, default=0.0, metavar="MS", help="simulate slow storage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(LOADERS)}")
    arguments = parser.parse_args()
    check_counts(arguments, *COUNTS)
    if arguments.open_latency_ms < 0:
        raise UserError(f"--open-latency-ms={arguments.open_latency_ms:g}: must not be negative")
    if arguments.images % arguments.batch:
        raise UserError(f"--images={arguments.images}: must be a multiple of --batch={arguments.batch}")
    check_outputs(arguments, "json")
    return arguments


def _select_loaders(only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in LOADERS:
            raise unknown_name("--only", name, LOADERS)
    return [name for name in LOADERS if (name in only if only else name != "dali" or dali_is_installed())]


def _without_folder_loaders(loaders: list[str], arguments: argparse.Namespace) -> list[str]:
    missing = ", ".join(name for name in loaders if name in READ_FOLDERS_ONLY)
    if missing and arguments.only:
        raise UserError(
            f"--only: {missing} cannot read shards, and {arguments.folder} contains shards; give a folder of images"
        )
    if missing:
        print(f"{arguments.folder} contains shards: skipping {missing}, which read folders only", file=sys.stderr)
    return [name for name in loaders if name not in READ_FOLDERS_ONLY]


def _select_images(arguments: argparse.Namespace) -> ImageIndex:
    """Return the images that a measurement reads, evenly spread over the folder; a small folder is read repeatedly."""
    index = find_images(arguments.folder.absolute())
    if index.classes == (".",):
        raise UserError(
            f"{arguments.folder}: has images without class folders; give the folder that contains the class folders"
        )
    count = arguments.images + 2 * _uncounted_batches(arguments) * arguments.batch
    return index.select(np.arange(count, dtype=np.int64) * len(index) // count)


def _fill_page_cache(index: ImageIndex) -> None:
    with closing(ImageBytes(index)) as stored:
        for sample in range(len(index)):
            try:
                stored.read(sample).tobytes()
            except OSError as error:
                raise UserError(
                    f"{index.location(sample)}: cannot be read ({error}); repair or remove the file"
                ) from error


def _uncounted_batches(arguments: argparse.Namespace) -> int:
    """Return the number of batches to read before the window, and again after it."""
    return 2 * int(arguments.workers)


def _measure_all(
    arguments: argparse.Namespace, loaders: list[str], index: ImageIndex, temporary: Path
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the measurements of each job and loader, one per repeat."""
    environment = _environment(arguments, temporary)
    images = temporary / "index.pickle"
    images.write_bytes(pickle.dumps(index))
    options = [str(images), *as_options(arguments, "batch", "workers")]
    options += [f"--uncounted-batches={_uncounted_batches(arguments)}"]

    def take(case: tuple[str, str], repeat: int) -> dict[str, Any]:
        title, loader = case
        return _measure(loader, [*options, *JOBS[title], f"--loader={loader}"], environment)

    return by_turns(itertools.product(JOBS, loaders), arguments.repeats, take)


def _measure(loader: str, options: list[str], environment: dict[str, str]) -> dict[str, Any]:
    return measure(loader, "measure_loader", options, environment)


def _environment(arguments: argparse.Namespace, temporary: Path) -> dict[str, str]:
    """Return the environment of the measuring processes; with --open-latency-ms, it preloads the delaying library."""
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
            raise UserError("--open-latency-ms: needs a C compiler, and `cc` is not installed; install gcc") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"--open-latency-ms: cc failed: {' '.join(error.stderr.split())[:300]}") from error
        environment["LD_PRELOAD"] = ":".join(filter(None, [str(library), environment.get("LD_PRELOAD")]))
        environment["SLOW_OPEN_FOLDER"] = str(arguments.folder.absolute())
        environment["SLOW_OPEN_MICROSECONDS"] = str(round(1000 * arguments.open_latency_ms))
    return environment


def _summary(
    title: str, loaders: list[str], found: dict[tuple[str, str], list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return the figures of each loader for one job."""
    speeds = {loader: [m["images_per_second"] for m in found[title, loader]] for loader in loaders}
    reference = statistics.median(speeds["timm"]) if "timm" in speeds else None
    return {
        loader: {
            "images_per_second": spread(values),
            "cpu_ms_per_image": statistics.median(m["cpu_ms"] for m in found[title, loader]),
            "peak_memory_mib": max(m["memory_mib"] for m in found[title, loader]),
            "ratio_to_timm": None if reference is None else statistics.median(values) / reference,
        }
        for loader, values in speeds.items()
    }


def _print(jobs: dict[str, dict[str, dict[str, Any]]]) -> None:
    out = console()
    for title, rows in jobs.items():
        table = Table(
            "loader", "images/s", "lowest to highest", "of timm", "CPU ms per image", "memory MiB", title=title
        )
        for loader, row in rows.items():
            speed, ratio = row["images_per_second"], row["ratio_to_timm"]
            speeds = (f"{speed['median']:.0f}", f"{speed['min']:.0f} to {speed['max']:.0f}")
            costs = (f"{row['cpu_ms_per_image']:.2f}", f"{row['peak_memory_mib']:.0f}")
            table.add_row(loader, *speeds, "-" if ratio is None else f"{ratio:.2f}", *costs)
        out.print(table)


if __name__ == "__main__":
    run_program(main)
