"""What the sample plan costs: microseconds of CPU time an image, at ImageNet's size, with the paper's augmentation.

  python scripts/benchmark_plan.py

`to_read` is a loader's part (order, crop, RandAugment), `to_transform` the trainer's (order, mixing, erasing).
"""

import time

from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import TrainingPlan

IMAGES, BATCHES, REPEATS = 1_281_167, 20, 15


def main() -> None:
    """The least of some repeats, for some sizes of a rank's batch."""
    for size in (64, 128, 256, 512, 1024):
        plan = TrainingPlan(IMAGES, size, 1, 0, 1, 0, 224, 0.9, AugmentationConfig())
        plan.batch(0, 0)  # makes the epoch's order
        for part in (plan.to_read, plan.to_transform):
            least = min(_seconds(part) for _ in range(REPEATS))
            print(f"batch {size:>4}, {part.__name__:>12}: {1e6 * least / BATCHES / size:.2f} us an image")


def _seconds(part: object) -> float:
    assert callable(part)
    started = time.process_time()
    for position in range(BATCHES):
        part(0, position)
    return time.process_time() - started


if __name__ == "__main__":
    main()
