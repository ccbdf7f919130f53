"""Tests of the three loaders on decoded pixels: the folder's batches, only the crop is read, and errors."""

import mmap
import os
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from metaformer.assembly import make_loader
from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.load.config import LoaderConfig, LoaderName
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.image_file import StoredImage, cut_out, read_ahead
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.plan.geometry import Box
from metaformer.data.plan.plan import BatchPlan
from metaformer.errors import UserError
from tests.data.conftest import decode
from tests.data.load.test_loaders import (
    CPU,
    evaluation_plan,
    every_loader,
    open_loader,
    read_epoch,
    training_plan,
)


@pytest.fixture(scope="module")
def pixels(pixel_root: Path) -> ImageIndex:
    return load_index(pixel_root, "train")


@every_loader
def test_a_file_is_opened_once_and_closed(pixels: ImageIndex, name: str) -> None:
    """A loader has each file open once, and none after it is closed."""

    def open_files() -> list[str]:
        links = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return sorted(link for link in links if link.startswith(str(pixels.folder)))

    assert pixels.shards is not None
    assert len(pixels.shards.names) > 2
    with open_loader(name, pixels, evaluation_plan(batch=3)) as loader:
        for _ in range(2):
            list(loader.epoch(0))
            opened = open_files()
            assert sorted(set(opened)) == [str(pixels.folder / each) for each in pixels.shards.names]
    assert open_files() == []


def test_only_the_rows_of_a_crop_are_read(tmp_path: Path) -> None:
    """A crop of 40 rows of a 24 MB image makes less than a quarter of the map resident."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (2000, 4000), "red").save(tmp_path / "data" / split / name / "x.JPEG")
    index = load_index(decode(tmp_path / "data", tmp_path / "pixels"), "train")
    stored = ImageBytes(index)
    view = stored.read(0)
    region = cut_out(view, Box(100, 2000, 300, 40))
    assert region.shape == (40, 300, 3)
    assert resident_kib(index.byte_range(0)[0]) < 6_000
    assert int(view.sum()) > 0
    assert resident_kib(index.byte_range(0)[0]) > 20_000
    stored.close()


def test_a_crop_reads_no_more_than_its_rows_from_the_disk(tmp_path: Path) -> None:
    """The kernel fetches the 40 rows of a crop in the middle of a large file, not what is around them."""
    height, width, row = 400, 500, 1500
    file = tmp_path / "pixels"
    file.write_bytes(bytes(20 * height * row))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    image = np.ndarray((height, width, 3), np.uint8, mapped, 10 * height * row)
    before = bytes_read()
    read_ahead(image, Box(100, 200, 300, 40))
    cut_out(image, Box(100, 200, 300, 40))
    read = bytes_read() - before
    if not read:
        pytest.skip("the temporary folder is in memory")
    assert read < 40 * row + 4 * mmap.PAGESIZE


def test_the_regions_of_a_batch_are_requested_before_the_first_is_cut_out(tmp_path: Path) -> None:
    """The disk has got the requests for all regions when the first image is decoded, and gets no others."""

    class Recorder(TorchReader):
        def decode(self, stored: StoredImage, plan: BatchPlan, row: int) -> Tensor:
            found.append(bytes_read())
            return super().decode(stored, plan, row)

    for split, name, number in product(("train", "val"), "ab", range(4)):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 200), "red").save(folder / f"{number}.JPEG")
    index = load_index(decode(tmp_path / "data", tmp_path / "pixels"), "train")
    assert index.shards is not None
    for name in index.shards.names:
        with (index.folder / name).open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found, before = list[int](), bytes_read()
    loader = WorkerLoader(
        Recorder(), index, replace(training_plan(batch=8), num_samples=8), 0, prefetch_batches=2, pin_memory=False
    )
    with closing(loader):
        list(loader.epoch(0))
    found.append(bytes_read())
    if found[-1] == before:
        pytest.skip("the temporary folder is in memory")
    assert len(found) == 9
    assert set(found) == {found[0]}
    assert found[0] > before


def bytes_read() -> int:
    """Return the bytes that the kernel has fetched from disks for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def resident_kib(file: Path) -> int:
    """Return how much of a file's maps in this process is resident."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


CHANGED = "the file has changed since it was indexed; start again, and do not modify data during a run"


@pytest.mark.parametrize("workers", [0, 1])
@every_loader
def test_a_file_that_changes_during_a_run_is_named(own_pixels: Path, name: str, workers: int) -> None:
    """A file that is cut short, or written, while a loader has it open fails at its first image; the process lives."""
    if name == "dali" and workers:
        pytest.skip("DALI has no workers")
    index, plan = load_index(own_pixels, "train"), evaluation_plan(batch=1)
    assert index.shards is not None
    good = read_epoch(name, index, plan)
    first = int((index.shards.numbers == 1).argmax())
    file = own_pixels / "train" / "pixels-000001.safetensors"
    whole = file.read_bytes()
    for spoil in (lambda: os.truncate(file, 600), lambda: file.write_bytes(whole), file.unlink):
        with open_loader(name, index, plan, workers) as loader:
            batches = loader.epoch(0)
            if spoil != file.unlink:
                assert torch.equal(next(batches), good[0])
            spoil()
            with pytest.raises(UserError) as caught:
                list(loader.epoch(0))
        reason = "cannot be read as an image (No such file" if spoil == file.unlink else CHANGED
        assert str(caught.value).startswith(f"{file}: {index.name(first)}: {reason}")
        assert "\n" not in str(caught.value)


@every_loader
def test_images_above_the_limit_are_named(pixels: ImageIndex, name: str) -> None:
    """loader.max_pixels holds for pixels too."""
    plan = training_plan(batch=13)
    loader = make_loader(LoaderConfig(LoaderName(name), max_pixels=9000), pixels, plan, CPU, 0)
    with pytest.raises(UserError, match=r"pixels-00000\d\.safetensors: a/2\.JPEG: .*more than loader\.max_pixels=9000"):
        list(loader.epoch(0))
    loader.close()


@every_loader
def test_resized_pixels_are_read_in_their_size(image_root: Path, tmp_path: Path, name: str) -> None:
    """Reduced images give other batches, equal between the loaders but for rounding."""
    index, plan = load_index(decode(image_root, tmp_path / "small", resize=32), "val"), replace(training_plan(), seed=3)
    found, reference = torch.cat(read_epoch(name, index, plan)), torch.cat(read_epoch("pil", index, plan))
    assert (found.float() - reference.float()).abs().mean() < 0.5
    original = torch.cat(read_epoch("pil", load_index(image_root, "val"), plan))
    assert (reference.float() - original.float()).abs().mean() > 1
