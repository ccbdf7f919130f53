"""Tests of the three loaders on packed images: in shards and as pixels, the batches are the folder's in every bit."""

from dataclasses import replace
from pathlib import Path

import pytest

from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import Plan
from tests.data.load.test_loaders import (
    evaluation_plan,
    every_loader,
    open_loader,
    read_epoch,
    same,
    training_plan,
)

PLANS: dict[str, Plan] = {
    "evaluation": evaluation_plan(batch=3),
    "evaluation of a rank": evaluation_plan(batch=3, rank=1, world_size=2),
    "training": training_plan(batch=3, augmentation=AugmentationConfig()),
    "training of a rank": replace(training_plan(batch=6), rank=1, world_size=2),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.fixture(scope="module")
def files(image_root: Path) -> ImageIndex:
    return load_index(image_root, "train")


@pytest.fixture(scope="module", params=["shard_root", "pixel_root"])
def packed(request: pytest.FixtureRequest) -> ImageIndex:
    root: Path = request.getfixturevalue(request.param)
    return load_index(root, "train")


@every_plan
@every_loader
def test_batches_are_the_folders(files: ImageIndex, packed: ImageIndex, name: str, plan: Plan) -> None:
    """Two epochs equal the folder's in every bit, the second from every resume point, even after an unfinished one."""
    for epoch in (0, 1):
        expected = read_epoch(name, files, plan, epoch)
        with open_loader(name, packed, plan) as loader:
            for first in range(len(expected) if epoch else 1):
                assert same(list(loader.epoch(epoch, first)), expected[first:]), (epoch, first)
                next(loader.epoch(0))


@pytest.mark.parametrize("name", ["torch", "pil"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_images(files: ImageIndex, packed: ImageIndex, name: str, workers: int) -> None:
    """Worker processes that read the same packed files give the folder's batches."""
    plan = PLANS["training"]
    expected = read_epoch(name, files, plan)
    with open_loader(name, packed, plan, workers) as loader:
        assert same(list(loader.epoch(0)), expected)
        assert same(list(loader.epoch(0, 2)), expected[2:])
