"""Measure the sample plan: microseconds of CPU time per image, at ImageNet's size, with the paper's augmentation.

  python -m benchmarks.plan

`to_read` is the loader's part (order, crop, RandAugment); `to_transform` is the trainer's (order, mixing, erasing).
"""

import argparse
import time
from collections.abc import Callable

from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import BatchPlan, TrainingPlan

IMAGES, BATCHES, REPEATS = 1_281_167, 20, 15


def main() -> None:
    """Print the fastest of several repeats for several batch sizes per rank."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for size in (64, 128, 256, 512, 1024):
        plan = TrainingPlan(
            num_samples=IMAGES,
            global_batch_size=size,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=0,
            image_size=224,
            crop_pct=0.9,
            augmentation=AugmentationConfig(),
        )
        plan.batch(0, 0)  # draws the epoch's order
        for part in (plan.to_read, plan.to_transform):
            fastest = min(_seconds(part) for _ in range(REPEATS))
            print(f"batch {size:>4}, {part.__name__:>12}: {1e6 * fastest / BATCHES / size:.2f} us per image")


def _seconds(part: Callable[[int, int], BatchPlan]) -> float:
    started = time.process_time()
    for position in range(BATCHES):
        part(0, position)
    return time.process_time() - started


if __name__ == "__main__":
    main()
