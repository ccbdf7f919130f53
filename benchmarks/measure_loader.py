"""Measure one loader on one job once, for loader.py: images per second, CPU time and memory of the process tree.

Prints a JSON object with `images_per_second`, `cpu_ms` (per image, summed over all cores) and `memory_mib`.
"""

import argparse
import itertools
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.config import LoaderConfig, LoaderName
from metaformer.data.plan.augmentation import AugmentationConfig, RandAugmentConfig
from metaformer.data.plan.geometry import evaluation_resize
from metaformer.data.plan.plan import EvaluationPlan, Plan, TrainingPlan
from metaformer.program import run_program

SIZE, CROP_PCT = 224, 0.9
TICKS = os.sysconf("SC_CLK_TCK")  # per second: the unit of time in /proc


@dataclass(frozen=True)
class Task:
    """The images to read, and how.

    Attributes:
        index: the images, a whole number of batches.
        uncounted_batches: number of batches before the measured window, and again after it.
    """

    index: ImageIndex
    training: bool
    randaugment: bool
    batch: int
    workers: int
    uncounted_batches: int

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Paths and labels, as torchvision's and timm's data sets store them."""
        return [(str(self.index.path(i)), int(label)) for i, label in enumerate(self.index.labels)]


def read_with_project(name: LoaderName, task: Task) -> Iterator[Any]:
    """Yield batches from one of this project's loaders, on the CPU."""
    from metaformer.assembly import make_loader  # here, because workers import this module, as they do train.py

    count = len(task.index)
    augmentation = AugmentationConfig(randaugment=RandAugmentConfig(num_ops=2 if task.randaugment else 0))
    plan: Plan = EvaluationPlan(
        num_samples=count, batch_size=task.batch, rank=0, world_size=1, image_size=SIZE, crop_pct=CROP_PCT
    )
    if task.training:
        plan = TrainingPlan(
            num_samples=count,
            global_batch_size=task.batch,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=0,
            image_size=SIZE,
            crop_pct=CROP_PCT,
            augmentation=augmentation,
        )
    yield from make_loader(LoaderConfig(name), task.index, plan, torch.device("cpu"), task.workers).epoch(0)


def read_with_timm(task: Task) -> Iterator[Any]:
    """Yield batches from timm's loader with the options of the paper's recipe."""
    from timm.data import ImageDataset, create_loader

    dataset = ImageDataset(str(task.index.folder))
    dataset.reader.samples = task.samples
    options: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": CROP_PCT}
    if task.training:
        operations = "rand-m9-mstd0.5-inc1" if task.randaugment else None
        options = {"interpolation": "random", "auto_augment": operations, "re_prob": 0.0, "color_jitter": None}
    options |= {"is_training": task.training, "num_workers": task.workers, "device": torch.device("cpu")}
    yield from create_loader(dataset, (3, SIZE, SIZE), task.batch, use_prefetcher=False, **options)


def read_with_torchvision(task: Task) -> Iterator[Any]:
    """Yield batches from torch's DataLoader with torchvision's ImageFolder, as in its training reference."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(evaluation_resize(SIZE, CROP_PCT), bicubic), transforms.CenterCrop(SIZE)]
    if task.training:
        steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
        steps += [transforms.RandAugment()] if task.randaugment else []
    steps += [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    dataset = ImageFolder(str(task.index.folder), transforms.Compose(steps))
    dataset.samples = task.samples
    train = task.training
    yield from torch.utils.data.DataLoader(dataset, task.batch, train, num_workers=task.workers, drop_last=train)


LOADERS: dict[str, Callable[[Task], Iterator[Any]]] = {
    "torch": partial(read_with_project, LoaderName.torch),
    "pil": partial(read_with_project, LoaderName.pil),
    "dali": partial(read_with_project, LoaderName.dali),
    "timm": read_with_timm,
    "torchvision": read_with_torchvision,
}


def main() -> None:
    """Read all images of a task and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path, help="a pickled ImageIndex")
    parser.add_argument("--loader", choices=LOADERS, required=True)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--randaugment", action="store_true")
    for name in ("--batch", "--workers", "--uncounted-batches"):
        parser.add_argument(name, type=int, required=True)
    options = vars(parser.parse_args())
    read, index = LOADERS[options.pop("loader")], pickle.loads(options.pop("index").read_bytes())
    print(json.dumps(measure(read, Task(index=index, **options))))


def measure(read: Callable[[Task], Iterator[Any]], task: Task) -> dict[str, float]:
    """Read all batches, and return the figures of those in the measured window."""
    batches = read(task)
    counted = len(task.index) // task.batch - 2 * task.uncounted_batches
    for _ in itertools.islice(batches, task.uncounted_batches):
        pass
    cpu, started = cpu_seconds(), time.perf_counter()
    for _ in itertools.islice(batches, counted):
        pass
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    memory = max(memory_mib() for _ in itertools.islice(batches, task.uncounted_batches))
    images = counted * task.batch
    return {"images_per_second": images / seconds, "cpu_ms": 1000 * cpu / images, "memory_mib": memory}


def process_tree() -> dict[int, list[str]]:
    """Return fields 3 and later of /proc/PID/stat (man 5 proc) for this process and its descendants, by process id."""
    fields = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields[int(file.parent.name)] = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
    tree = [os.getpid()]
    for parent in tree:
        tree += [pid for pid, values in fields.items() if int(values[1]) == parent]
    return {pid: fields[pid] for pid in tree}


def cpu_seconds() -> float:
    """Return the user and system time of the process tree, including processes that have ended."""
    return sum(int(ticks) for values in process_tree().values() for ticks in values[11:15]) / TICKS


def memory_mib() -> float:
    """Return the PSS of the process tree."""
    kib = 0
    for pid in process_tree():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


if __name__ == "__main__":
    run_program(main)
