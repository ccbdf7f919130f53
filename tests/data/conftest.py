"""Small real image folders, and shards of them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.prepare.pieces import pieces_of
from metaformer.data.prepare.shard_writer import Packing, write_shards

# (width, height) of the images of class "a"; odd, extreme and tiny ones among them
SIZES = ((97, 64), (64, 97), (120, 90), (75, 75), (33, 200), (260, 21), (47, 61), (19, 23))


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth RGB picture with some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, first_seed: int) -> None:
    """Three classes: RGB JPEGs of many sizes; gray, CMYK and progressive JPEGs; PNGs in the guise of JPEGs."""
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
    turned[0x0112] = 6  # "rotate by 90 degrees", which PIL, timm and so every loader here ignore
    odd.save(folder / "c" / "turned.JPEG", exif=turned)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 13 training and 13 validation images in 3 classes; tests must leave it as it is."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", first_seed=0)
    write_images(root / "val", first_seed=1000)
    return root


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `image_root`, for one test to change; caches outside it go to a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "data" / "train", first_seed=0)
    write_images(tmp_path / "data" / "val", first_seed=1000)
    return tmp_path / "data"


def pack(source: Path, out: Path, shard_bytes: int = 20_000, max_side: int | None = None) -> Path:
    """The data set as shards of a few images each, written in this process; returns `out`."""
    for split in ("train", "val"):
        pieces = pieces_of(load_index(source, split))
        with ThreadPoolExecutor(1) as pool:
            write_shards(pieces, out / split, Packing(shard_bytes, max_side), pool, lambda *step: None)
    return out


@pytest.fixture(scope="session")
def shard_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_root` as shards, several of each split; tests must leave it as it is."""
    return pack(image_root, tmp_path_factory.mktemp("shards"))


@pytest.fixture
def own_shards(own_root: Path) -> Path:
    """`own_root` as shards, for one test to change."""
    return pack(own_root, own_root.parent / "shards")
