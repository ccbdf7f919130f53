"""Fixtures with small folders of real images, and shards and pixels made of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.prepare.pixel_writer import PixelPacking, size_images, write_pixels
from metaformer.data.prepare.shard_writer import Packing, write_shards
from metaformer.data.prepare.source_images import list_source_images

# (width, height) of the images of class "a", including odd, extreme and tiny sizes
SIZES = ((97, 64), (64, 97), (120, 90), (75, 75), (33, 200), (260, 21), (47, 61), (19, 23))


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Make a smooth RGB picture with some noise, similar to a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, first_seed: int) -> None:
    """Write three classes: RGB JPEGs of many sizes; gray, CMYK and progressive JPEGs; a PNG and a rotated JPEG."""
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
    for number, size in enumerate(SIZES):
        picture(*size, seed=first_seed + number).save(folder / "a" / f"{number}.JPEG", quality=92)
    odd = picture(83, 71, first_seed + 100)
    odd.convert("L").save(folder / "b" / "gray.JPEG")
    odd.convert("CMYK").save(folder / "b" / "cmyk.JPEG", format="JPEG")
    odd.save(folder / "b" / "progressive.JPEG", progressive=True, subsampling="4:2:0")
    odd.save(folder / "c" / "png.JPEG", format="PNG")
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees", which PIL, timm and all loaders ignore
    odd.save(folder / "c" / "turned.JPEG", exif=turned)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 13 training and 13 validation images in 3 classes; tests must not modify it."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", first_seed=0)
    write_images(root / "val", first_seed=1000)
    return root


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `image_root` that a test may modify; caches outside it go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "data" / "train", first_seed=0)
    write_images(tmp_path / "data" / "val", first_seed=1000)
    return tmp_path / "data"


def pack(source: Path, out: Path, shard_bytes: int = 20_000, max_side: int | None = None) -> Path:
    """Pack the data set into shards of a few images each, in this process; return `out`."""
    for split in ("train", "val"):
        sources = list_source_images(load_index(source, split))
        with ThreadPoolExecutor(1) as pool:
            write_shards(sources, out / split, Packing(shard_bytes, max_side), pool, lambda *step: None)
    return out


@pytest.fixture(scope="session")
def shard_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_root` packed into several shards per split; tests must not modify it."""
    return pack(image_root, tmp_path_factory.mktemp("shards"))


@pytest.fixture
def own_shards(own_root: Path) -> Path:
    """`own_root` packed into shards that a test may modify."""
    return pack(own_root, own_root.parent / "shards")


def decode(source: Path, out: Path, shard_bytes: int = 100_000, resize: int | None = None) -> Path:
    """Decode the data set into files of a few images each, in this process; return `out`."""
    packing = PixelPacking(shard_bytes, resize)
    for split in ("train", "val"):
        sources = list_source_images(load_index(source, split))
        with ThreadPoolExecutor(1) as pool:
            images = size_images(sources, packing, pool, lambda *step: None)
            write_pixels(images, out / split, packing, pool, lambda *step: None)
    return out


@pytest.fixture(scope="session")
def pixel_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_root` decoded into several files of pixels per split; tests must not modify it."""
    return decode(image_root, tmp_path_factory.mktemp("pixels"))


@pytest.fixture
def own_pixels(own_root: Path) -> Path:
    """`own_root` decoded into pixels that a test may modify."""
    return decode(own_root, own_root.parent / "pixels")
