"""Measure how many bytes per image training reads from the disk for its random crops, for each storage format.

  python -m benchmarks.storage /path/to/imagenet/val /path/to/imagenet-pixels/val --rate 200 --json storage.json
  python -m benchmarks.storage /path/to/imagenet/val --rate 200 --throttle  # as root, with the cgroup controller blkio

The files are first removed from the page cache. One process then reads each image of an epoch once, as a worker of the
torch loader does, without resizing it. The kernel counts the bytes that it fetches from the disk, including read-ahead
(read_bytes in /proc/self/io). From that follows the number of images per second that a disk with --rate MB/s could
supply, whatever the CPU. Use thousands of images: in a small set, most images are read ahead with their neighbours.

With --throttle, the torch loader with a worker per core then reads them once more, with crop and flip, from a disk that
the kernel limits to --rate MB/s for its processes: images per second, measured from the first batch to the last.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.harness import check_counts, check_outputs, console, write_json
from benchmarks.reading import training_batches, training_plan
from metaformer.data.index.image_index import ImageIndex, find_images
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.plan.augmentation import RandAugmentConfig
from metaformer.errors import UserError
from metaformer.program import run_program

LOADER_BATCH = 64
BLKIO = Path("/sys/fs/cgroup/blkio")


def main() -> None:
    """Measure each folder, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--rate", type=int, default=200, metavar="MB", help="of the disk, in MB/s; default: 200")
    parser.add_argument("--throttle", action="store_true", help="limit the disk, and measure the whole loader")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    check_counts(arguments, "rate")
    check_outputs(arguments, "json")
    torch.set_num_threads(1)
    found = {str(folder): measure(find_images(folder), arguments.rate) for folder in arguments.folders}
    if arguments.throttle:
        with _limited_disks(arguments.folders, arguments.rate):
            for name, row in found.items():
                row["loader_images_per_second"] = measure_loader(find_images(Path(name)))
    speed = f"images/s at {arguments.rate} MB/s"
    table = Table("folder", "stored, kB", "read, kB", f"{speed}, at most", f"{speed}, loader", title="per image")
    for name, row in found.items():
        figures = (row["stored_bytes"] / 1000, row["read_bytes"] / 1000)
        loader = row.get("loader_images_per_second")
        speeds = (f"{row['images_per_second']:.0f}", "-" if loader is None else f"{loader:.0f}")
        table.add_row(name, *(f"{figure:.1f}" for figure in figures), *speeds)
    console().print(table)
    write_json(arguments.json, {"rate_mb": arguments.rate, "cases": found})


def measure(index: ImageIndex, rate: int) -> dict[str, float]:
    """Return the stored and the read bytes per image, and the images per second at `rate` MB/s."""
    reader = TorchReader()
    batches = training_batches(index, len(index), RandAugmentConfig(num_ops=0))
    _drop_from_page_cache(index)
    images, before = 0, _bytes_read()
    with closing(ImageBytes(index)) as stored:
        for plan in batches:
            images += len(plan)
            stored.read_ahead(plan)
            for row, sample in enumerate(plan.samples.tolist()):
                reader.decode(stored.read(sample), plan, row)
    read = (_bytes_read() - before) / images
    if not read:
        raise UserError(f"{index.folder}: nothing was read from a disk; it is in memory, or on a network file system")
    return {
        "stored_bytes": float(index.sizes.mean()),
        "read_bytes": read,
        "images_per_second": rate * 1_000_000 / read,
    }


def measure_loader(index: ImageIndex) -> float:
    """Return the images per second of the torch loader, with nothing in the page cache."""
    plan = training_plan(index, min(LOADER_BATCH, max(1, len(index) // 4)), RandAugmentConfig(num_ops=0))
    _drop_from_page_cache(index)
    loader = WorkerLoader(TorchReader(), index, plan, os.cpu_count() or 1, prefetch_batches=2, pin_memory=False)
    with closing(loader):
        batches = loader.epoch(0)
        next(batches)
        started = time.perf_counter()
        images = sum(len(batch) for batch in batches)
        return images / (time.perf_counter() - started)


@contextmanager
def _limited_disks(folders: Sequence[Path], rate: int) -> Iterator[None]:
    """Limit this process, and those that it starts within the block, to reading `rate` MB/s from the folders' disks."""
    group = BLKIO / f"metaformer-storage-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--throttle: {group}: {reason}; it needs root, and version 1 of the cgroup blkio") from error
    try:
        for device in {folder.stat().st_dev for folder in folders}:
            limit = f"{os.major(device)}:{os.minor(device)} {rate * 1_000_000}"
            (group / "blkio.throttle.read_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            (BLKIO / "cgroup.procs").write_text(process)
        group.rmdir()


def _drop_from_page_cache(index: ImageIndex) -> None:
    shards = index.shards
    files = map(index.path, range(len(index))) if shards is None else (index.folder / name for name in shards.names)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    run_program(main)
