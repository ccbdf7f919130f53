"""Tests of reading images that are named one by one, passing over those that cannot be read."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaformer.data.index.image_index import load_index
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.listed_images import list_images, read_listed
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.load.reader import ImageReader
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.plan.plan import EvaluationPlan
from metaformer.data.prepare.conversion import convert
from metaformer.data.prepare.shard_writer import Packing

PLAN = EvaluationPlan(num_samples=1, batch_size=1, rank=0, world_size=1, image_size=32, crop_pct=0.9).batch(0, 0)


@pytest.mark.parametrize("reader", [TorchReader(), PilReader()])
def test_same_pixels_as_a_loader(images: Path, reader: ImageReader[Any]) -> None:
    """A folder's images are those of its index, in the same order, with the same pixels, in any batch size."""
    index = load_index(images, "train")
    listed, problems = list_images([str(images / "train")])
    assert [image.name for image in listed] == [str(index.path(sample)) for sample in range(len(index))]
    assert not problems
    stored = ImageBytes(index)
    expected = torch.stack([reader.read(stored.read(sample), PLAN, 0) for sample in range(len(index))])
    for size, threads in ((1, 1), (7, 3), (48, 2), (100, 4)):
        batches = list(read_listed(listed, reader, PLAN, size, threads))
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
        assert [name for batch in batches for name in batch.names] == [image.name for image in listed]
        assert max(map(len, (batch.names for batch in batches))) == min(size, 48)


def test_bad_files_are_passed_over(images: Path, tmp_path: Path) -> None:
    """Files that cannot be read are named with the reason, wherever they are in a batch; the others are read."""
    good = sorted(str(file) for file in (images / "val" / "class_0").iterdir())[:3]
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes(Path(good[0]).read_bytes()[:300])
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder").mkdir()
    bad = [str(tmp_path / name) for name in ("empty.jpg", "text.png", "cut.jpg", "fifo.jpg", "missing.jpg")]
    listed, problems = list_images([bad[0], good[0], *bad[1:], good[1], str(tmp_path / "folder"), good[2]])
    assert [problem.name for problem in problems] == [str(tmp_path / "folder")]
    assert problems[0].reason.startswith("no images in this folder; image suffixes are .jpg")
    for size in (1, 4, 8):
        batches = list(read_listed(listed, TorchReader(), PLAN, size, 2))
        assert [name for batch in batches for name in batch.names] == good
        assert [each.name for batch in batches for each in batch.unreadable] == bad
        reasons = [each.reason for batch in batches for each in batch.unreadable]
        assert reasons[-2:] == ["not a regular file", "No such file or directory"]
        assert all(len(batch.pixels) == len(batch.names) for batch in batches)


def test_folders(images: Path, tmp_path: Path) -> None:
    """Folders are read with those below, without hidden files and other suffixes; a named file may have any suffix."""
    source = next((images / "train" / "class_0").iterdir())
    for name in ("b/c/1.jpg", "b/2.PNG", "a.jpeg", ".hidden.jpg", "b/.git/3.jpg", "notes.txt", "other"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source.read_bytes())
    listed, _ = list_images([str(tmp_path), str(tmp_path / "other")])
    assert [image.name.removeprefix(f"{tmp_path}/") for image in listed] == ["a.jpeg", "b/2.PNG", "b/c/1.jpg", "other"]
    (batch,) = read_listed(listed, TorchReader(), PLAN, 8, 1)
    assert batch.pixels.shape == (4, 3, 32, 32)


def test_shards(images: Path, tmp_path: Path) -> None:
    """A folder of shards stands for the images in them."""
    convert(images, tmp_path / "packed", Packing(10**6), 1, lambda *_: None)
    index = load_index(images, "train")
    listed, _ = list_images([str(tmp_path / "packed" / "train")])
    (batch,) = read_listed(listed, TorchReader(), PLAN, 100, 2)
    assert len(batch.names) == len(index) == 48
    stored = ImageBytes(index)
    expected = [TorchReader().read(stored.read(sample), PLAN, 0).numpy() for sample in range(48)]
    assert np.array_equal(batch.pixels.numpy(), np.stack(expected))
    assert "shard-000000.tar: class_0/" in batch.names[0]
