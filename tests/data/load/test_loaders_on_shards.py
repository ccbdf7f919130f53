"""Tests of the three loaders on shards: batches identical to the folder's, and errors that name the image."""

import os
from pathlib import Path

import pytest
import torch

from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.errors import UserError
from tests.data.conftest import pack
from tests.data.load.test_loaders import (
    damage,
    evaluation_plan,
    every_loader,
    open_loader,
    read_epoch,
    training_plan,
)


@pytest.fixture(scope="module")
def shards(shard_root: Path) -> ImageIndex:
    return load_index(shard_root, "train")


@every_loader
def test_a_shard_is_opened_once_and_closed(shards: ImageIndex, name: str) -> None:
    """A loader has each shard open once, and none after it is closed."""

    def open_shards() -> list[str]:
        links = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return sorted(link for link in links if link.startswith(str(shards.folder)))

    assert shards.shards is not None
    with open_loader(name, shards, evaluation_plan(batch=3)) as loader:
        for _ in range(2):
            list(loader.epoch(0))
            assert open_shards() == [str(shards.folder / tar) for tar in shards.shards.names]
    assert open_shards() == []


@pytest.mark.parametrize("kind", ["truncated", "header only", "text", "empty", "broken PNG", "absurd size"])
@every_loader
def test_a_bad_image_is_named(own_root: Path, tmp_path: Path, name: str, kind: str) -> None:
    """An unreadable image raises a one-line UserError that starts with its shard and its name in it."""
    damage(own_root, kind)
    index = load_index(pack(own_root, tmp_path / "shards"), "train")
    with pytest.raises(UserError) as error:
        read_epoch(name, index, training_plan(batch=13))
    place = f"{tmp_path}/shards/train/shard-000000.tar: a/3.JPEG"
    assert index.location(3) == place
    assert str(error.value).startswith(f"{place}: cannot be read as an image (")
    assert "0x" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@every_loader
def test_a_shard_that_vanishes_is_named(own_shards: Path, name: str) -> None:
    """A tar that was truncated or removed since the start fails at its first image, after the batches before it."""
    index, plan = load_index(own_shards, "train"), evaluation_plan(batch=1)
    assert index.shards is not None
    good = read_epoch(name, index, plan)
    first = int((index.shards.numbers == 1).argmax())
    tar = own_shards / "train" / "shard-000001.tar"
    for spoil, reason in (
        (lambda: os.truncate(tar, 600), "the shard ends before the image"),
        (tar.unlink, "No such file"),
    ):
        spoil()
        with open_loader(name, index, plan) as loader:
            batches = loader.epoch(0)
            assert all(torch.equal(next(batches), good[position]) for position in range(first))
            with pytest.raises(UserError, match=rf"^{tar}: {index.name(first)}: cannot be read .*\({reason}"):
                next(batches)
