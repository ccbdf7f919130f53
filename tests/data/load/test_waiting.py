"""Test that loaders tell what a wait for a batch was for."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metaformer.assembly import make_loader
from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.load.config import LoaderConfig, LoaderName
from metaformer.data.plan.augmentation import AugmentationConfig, RandAugmentConfig
from metaformer.interfaces import Waiting
from tests.conftest import REPOSITORY
from tests.data.load.test_loaders import WITHOUT_RANDAUGMENT, training_plan

CPU = torch.device("cpu")
STAGES = Waiting._fields

# Prints, for each loader, the seconds waited by stage.
PROGRAM = """
import json, sys
from pathlib import Path
from metaformer.data.index.image_index import load_index
from metaformer.data.load.config import LoaderName
from tests.data.load.test_waiting import waits

index = load_index(Path(sys.argv[1]), "train")
print(json.dumps({name: waits(LoaderName(name), index) for name in ("torch", "dali")}))
"""


def waits(name: LoaderName, index: ImageIndex, workers: int = 0, **augmentation: Any) -> Waiting:
    """Return the seconds by stage that the second epoch was waited for: decoders start in the first."""
    plan = training_plan(batch=2, augmentation=replace(WITHOUT_RANDAUGMENT, **augmentation))
    with closing(make_loader(LoaderConfig(name), index, plan, CPU, workers)) as loader:
        found = [[loader.waited for _ in loader.epoch(epoch)] for epoch in range(2)][1]
    return Waiting(*(sum(stage) for stage in zip(*found, strict=True)))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_slow_disk_is_told(image_root: Path, tmp_path: Path) -> None:
    """The loaders wait for reading most if opening a file takes 100 ms longer."""
    library = tmp_path / "slow.so"
    source = str(REPOSITORY / "benchmarks" / "slow_open.c")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", str(library), "-ldl"], check=True)
    slow = {"LD_PRELOAD": str(library), "SLOW_OPEN_FOLDER": str(image_root), "SLOW_OPEN_MICROSECONDS": "100000"}
    slow["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = tmp_path / "program.py"
    program.write_text(f"if __name__ == '__main__':\n{PROGRAM}".replace("\n", "\n    "))
    command = [sys.executable, str(program), str(image_root)]
    done = subprocess.run(command, env=os.environ | slow, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, stages in json.loads(done.stdout).items():
        waited = Waiting(*stages)
        assert waited.read == max(waited), (name, waited)


@pytest.mark.parametrize("name", [LoaderName.torch, LoaderName.pil, LoaderName.dali])
def test_heavy_augmentation_is_told(image_root: Path, name: LoaderName) -> None:
    """With 60 operations per image, each loader waits for augmentation most."""
    randaugment = RandAugmentConfig(num_ops=60, probability=1.0)
    waited = waits(name, load_index(image_root, "train"), randaugment=randaugment)
    assert waited.augment == max(waited), waited


def test_cutting_pixels_out_of_their_map_is_reading(pixel_root: Path) -> None:
    """Images that are stored decoded have no decoding: their pages are read when they are cut out."""
    waited = waits(LoaderName.torch, load_index(pixel_root, "train"))
    assert waited.decode == 0 < waited.read


def test_a_batch_that_is_ready_is_only_copied(image_root: Path) -> None:
    """The wait for a batch that a worker completed before is copying; without workers, nothing is copied."""
    index, plan = load_index(image_root, "train"), training_plan(augmentation=AugmentationConfig())
    with closing(make_loader(LoaderConfig(LoaderName.torch), index, plan, CPU, 1)) as loader:
        batches = loader.epoch(0)
        next(batches)
        first = loader.waited
        time.sleep(1)
        next(batches)
        assert max(loader.waited[:3]) < 1e-9 < loader.waited.copy
    assert min(first) > 0
    epochs = [waits(LoaderName.torch, index) for _ in range(5)]  # what interrupts this process counts as copying
    assert min(waited.copy / waited.total for waited in epochs) < 0.1
