"""Measure the stages of reading an image in a worker of the torch loader, in milliseconds of one core.

  python -m benchmarks.reading /path/to/imagenet/val /path/to/imagenet-pixels/val --json reading.json

Each folder contains class folders of images, shards or pixels. One process reads the images of the plan's training
batches at 224 px without sending them anywhere. The figures are the CPU time of that process, the fastest of --repeats
repeats, which alternate between the folders. The last columns are the resulting images per second of a core, with crop
and flip, and with RandAugment in addition.

    read        open and read the file or its part of a shard; for pixels, only find them in the map
    decode      decode the crop's region; for pixels, copy it from the map
    resize      resize to 224 px, and flip
    RandAugment the paper's, with PIL's operations
    batch       copy into the batch
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.harness import check_counts, check_outputs, console, write_json
from metaformer.data.index.image_index import ImageIndex, find_images
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.image_file import StoredImage
from metaformer.data.load.jpeg_decoder import DECODERS, DecodeRegion, region_decoder
from metaformer.data.load.torch_reader import TorchReader, open_stored
from metaformer.data.plan.augmentation import AugmentationConfig, RandAugmentConfig
from metaformer.data.plan.plan import BatchPlan, TrainingPlan
from metaformer.program import run_program

SIZE, BATCH = 224, 16
STAGES = ("read", "decode", "resize", "RandAugment", "batch")
JOBS = ("images/s", "images/s with RandAugment")


def main() -> None:
    """Measure each folder, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--images", type=int, default=96, help="images of a repeat; default: 96")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument(
        "--decoders", nargs="+", choices=DECODERS, default=[], help="of JPEGs, compared; default: the one that is used"
    )
    arguments = parser.parse_args()
    check_counts(arguments, "images", "repeats")
    check_outputs(arguments, "json")
    torch.set_num_threads(1)
    indices = {str(folder): find_images(folder) for folder in arguments.folders}
    decoders = {name: DECODERS[name]() for name in arguments.decoders} or {"": region_decoder()}
    cases = {
        f"{folder} {name}".strip(): Reading(index, decoder, arguments.images)
        for folder, index in indices.items()
        for name, decoder in decoders.items()
    }
    for _ in range(arguments.repeats + 1):  # by turns; the first warms up
        for reading in cases.values():
            reading.measure()
    found = {name: reading.figures() for name, reading in cases.items()}
    table = Table("folder", *STAGES, *JOBS, title="ms of one core per image")
    for name, row in found.items():
        table.add_row(name, *(f"{row[stage]:.3f}" for stage in STAGES), *(f"{row[job]:.0f}" for job in JOBS))
    console().print(table)
    write_json(arguments.json, {"images": arguments.images, "repeats": arguments.repeats, "cases": found})


class Reading:
    """Measures one data set with one JPEG decoder, and keeps the fastest time of each stage."""

    def __init__(self, index: ImageIndex, decoder: DecodeRegion, images: int) -> None:
        self._stored, self._decoder, self._reader = ImageBytes(index), decoder, TorchReader(decoder=decoder)
        plain = training_batches(index, images, RandAugmentConfig(num_ops=0))
        augmented = training_batches(index, images, RandAugmentConfig())
        self._batch = torch.empty((1, 3, SIZE, SIZE), dtype=torch.uint8).to(memory_format=torch.channels_last)[0]
        image = torch.zeros((SIZE, SIZE, 3), dtype=torch.uint8).permute(2, 0, 1)
        self._works: dict[str, tuple[list[BatchPlan], Callable[[BatchPlan, int], Any]]] = {
            "read": (plain, self._read),
            "decode": (plain, self._decode),
            "batch": (plain, lambda plan, row: self._batch.copy_(image)),
            "plain": (plain, self._make_image),
            "augmented": (augmented, self._make_image),
        }
        self._fastest = dict.fromkeys(self._works, float("inf"))

    def measure(self) -> None:
        """Measure each stage once."""
        for name, (plans, work) in self._works.items():
            self._fastest[name] = min(self._fastest[name], _milliseconds(plans, work))

    def figures(self) -> dict[str, float]:
        """Return the milliseconds of each stage, and images per second of each job."""
        fastest = self._fastest
        return {
            "read": fastest["read"],
            "decode": fastest["decode"] - fastest["read"],
            "resize": fastest["plain"] - fastest["decode"] - fastest["batch"],
            "RandAugment": fastest["augmented"] - fastest["plain"],
            "batch": fastest["batch"],
            JOBS[0]: 1000 / fastest["plain"],
            JOBS[1]: 1000 / fastest["augmented"],
        }

    def _read(self, plan: BatchPlan, row: int) -> StoredImage:
        return self._stored.read(int(plan.samples[row]))

    def _decode(self, plan: BatchPlan, row: int) -> None:
        (width, height), cut = open_stored(self._read(plan, row), decode=self._decoder)
        cut(plan.region(row, width, height))

    def _make_image(self, plan: BatchPlan, row: int) -> None:
        self._batch.copy_(self._reader.read(self._read(plan, row), plan, row))


def training_batches(index: ImageIndex, images: int, randaugment: RandAugmentConfig) -> list[BatchPlan]:
    """Return the plans of at least one batch, as the loader receives them."""
    plan = training_plan(index, min(BATCH, len(index)), randaugment)
    each = plan.batches_per_epoch
    return [plan.to_read(*divmod(number, each)) for number in range(max(1, images // BATCH))]


def training_plan(index: ImageIndex, batch: int, randaugment: RandAugmentConfig) -> TrainingPlan:
    """Return the plan of a training with the paper's crops on one rank."""
    return TrainingPlan(
        num_samples=len(index),
        global_batch_size=batch,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        image_size=SIZE,
        crop_pct=0.9,
        augmentation=AugmentationConfig(randaugment=randaugment),
    )


def _milliseconds(plans: list[BatchPlan], work: Callable[[BatchPlan, int], Any]) -> float:
    started = time.process_time()
    for plan in plans:
        for row in range(len(plan)):
            work(plan, row)
    return 1000 * (time.process_time() - started) / sum(map(len, plans))


if __name__ == "__main__":
    run_program(main)
