"""Tests of the writer of pixels: interruptions, full disks, disk space, images that change or do not decode."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.prepare import pixel_writer
from metaformer.data.prepare.conversion import convert
from metaformer.data.prepare.image_sizes import ImageSize
from metaformer.data.prepare.pixel_writer import PixelPacking, size_images, stored_size, write_pixels
from metaformer.data.prepare.source_images import SourceImage, list_source_images
from metaformer.errors import UserError
from tests.data.conftest import decode, picture

COUNT, SIDE = 60, 250  # images in `source`: 187,500 bytes of pixels each, 11 MB in total


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for split in ("train", "val"):
        for number in range(COUNT if split == "train" else 3):
            file = root / split / f"class_{number % 3}" / f"{number:02}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(SIDE, SIDE, number).save(file)
    return root


def write(source: Path, folder: Path, packing: PixelPacking) -> None:
    with ThreadPoolExecutor(1) as pool:
        images = size_images(list_source_images(load_index(source, "train")), packing, pool, lambda *step: None)
        write_pixels(images, folder, packing, pool, lambda *step: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


WRITE = """
import sys
from pathlib import Path
from metaformer.data.prepare.conversion import convert
from metaformer.data.prepare.pixel_writer import PixelPacking
if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    convert(source, out, PixelPacking(400_000), 2, lambda *step: None)
"""


def test_a_killed_writing_is_resumed(source: Path, tmp_path: Path) -> None:
    """After SIGKILL the target does not exist, and files are complete or absent. Repeating the command keeps them and
    makes the others; the result equals that of an undisturbed call byte for byte."""
    (tmp_path / "write.py").write_text(WRITE)
    out, partial = tmp_path / "out", tmp_path / ".out.pixels" / "train"
    command = [sys.executable, str(tmp_path / "write.py"), str(source), str(out)]
    process = subprocess.Popen(command, start_new_session=True)
    while len(list(partial.glob("pixels-*.safetensors"))) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    made = {file.name: file.stat().st_ino for file in partial.glob("pixels-*.safetensors")}
    assert len(made) < COUNT // 2
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert re.search(
        r"63 images take 0\.0 GB as pixels, of which 0\.0 GB are written; [\d,.]+ GB are free", done.stderr
    )
    write(source, tmp_path / "undisturbed", PixelPacking(400_000))
    assert contents(out / "train") == contents(tmp_path / "undisturbed")
    assert all((out / "train" / name).stat().st_ino == inode for name, inode in made.items())
    assert not partial.exists()


def test_an_interrupted_writing_with_other_options_is_refused(source: Path, tmp_path: Path) -> None:
    """Files of another --resize or size are not mixed."""
    folder = tmp_path / "out" / "train"
    write(source, folder, PixelPacking(10**6))
    (folder / "pixels.json").unlink()
    (folder / "plan.sha256").write_text("of another call")
    with pytest.raises(UserError, match=r"out: was started with other images or other options; repeat that"):
        write(source, folder, PixelPacking(10**6, 128))


def test_a_disk_that_fills_is_reported(source: Path, small_disk: Path, tmp_path: Path) -> None:
    """Files that fit are kept, and the message names the one that does not; on a larger disk they are continued."""
    packing = PixelPacking(2_000_000)
    with pytest.raises(UserError) as error:
        write(source, small_disk / "train", packing)
    message = rf"{small_disk}/train/pixels-000005\.safetensors: cannot be written \(No space left on device\); the same"
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)
    found = contents(small_disk / "train")
    assert sorted(found) == [*(f"pixels-{number:06}.safetensors" for number in range(5)), "plan.sha256"]
    shutil.copytree(small_disk / "train", tmp_path / "larger")
    write(source, tmp_path / "larger", packing)
    write(source, tmp_path / "undisturbed", packing)
    assert contents(tmp_path / "larger") == contents(tmp_path / "undisturbed")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_decoded(
    source: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The required space is compared with the free space first; a smaller --resize fits."""
    with pytest.raises(UserError) as error:
        convert(source, small_disk / "out", PixelPacking(), 1, lambda *step: None)
    message = (
        rf"{small_disk}: 63 images take 0\.0 GB as pixels, but only 0\.0 GB are free there; use another disk, or a"
    )
    assert re.match(message, str(error.value))
    assert not list(small_disk.rglob("*.safetensors"))
    convert(source, small_disk / "out", PixelPacking(resize=100), 1, lambda *step: None)
    assert "63 images take 0.0 GB as pixels; 0.0 GB are free in" in capsys.readouterr().err
    assert (small_disk / "out" / "train" / "pixels-000000.safetensors").stat().st_size < 2_000_000


def test_files_fill_up_to_their_size(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file contains as many images as fit, but no more than MAX_IMAGES; a larger image gets its own."""
    for shard_bytes, limit, images in ((800_000, 99, 4), (1, 99, 1), (10**9, 7, 7)):
        monkeypatch.setattr(pixel_writer, "MAX_IMAGES", limit)
        folder = tmp_path / f"{shard_bytes} {limit}"
        write(source, folder, PixelPacking(shard_bytes))
        assert len(list(folder.glob("*.safetensors"))) == -(-COUNT // images)


def test_sizes_after_resizing() -> None:
    """The short side is reduced and the aspect kept; nothing is enlarged, and no side vanishes."""
    for size, resize, expected in (
        ((500, 375), 256, (341, 256)),
        ((375, 500), 256, (256, 341)),
        ((500, 375), None, (500, 375)),
        ((200, 900), 256, (200, 900)),
        ((1, 5000), 32, (1, 5000)),
    ):
        assert stored_size(ImageSize(*size), resize) == expected


def test_an_image_that_does_not_decode_is_named(own_root: Path, tmp_path: Path) -> None:
    """Text and a truncated JPEG stop the writing with an error that names the file; its shard does not appear."""
    file = own_root / "train" / "a" / "3.JPEG"
    for content in (b"no image", file.read_bytes()[:-600]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"^.*train/a/3\.JPEG: cannot be read as an image \("):
            decode(own_root, tmp_path / "out", shard_bytes=10**6)
        assert not list((tmp_path / "out").rglob("pixels*"))


def test_an_image_that_changes_meanwhile_is_named(own_root: Path, tmp_path: Path) -> None:
    """An image whose size is not that of the plan stops the writing, because its place would not fit."""
    packing = PixelPacking(10**6)
    with ThreadPoolExecutor(1) as pool:
        sources = list_source_images(load_index(own_root, "train"))
        images = size_images(sources, packing, pool, lambda *step: None)
        images[3] = images[3]._replace(size=ImageSize(75, 74))
        with pytest.raises(UserError, match=r"train/a/3\.JPEG: has changed while it was being read; start again"):
            write_pixels(images, tmp_path / "out", packing, pool, lambda *step: None)


def test_sizes_of_all_kinds_of_images(own_root: Path) -> None:
    """Sizes come from the header; also those of PNGs, of JPEGs with large metadata and of those in an archive."""
    turned = Image.open(own_root / "train" / "c" / "turned.JPEG")
    exif = turned.getexif()
    exif[0x9286] = "x" * 50_000
    turned.save(own_root / "train" / "c" / "turned.JPEG", exif=exif)
    with ThreadPoolExecutor(1) as pool:
        index = load_index(own_root, "train")
        found = size_images(list_source_images(index), PixelPacking(), pool, lambda *step: None)
    for sample, image in enumerate(found):
        with Image.open(index.path(sample)) as file:
            assert image.size == file.size, index.path(sample)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/\udcff.JPEG"], r"files of pixels require names in UTF-8; rename it"),
        (["../x.JPEG"], "refused: '../x.JPEG' is not CLASS/IMAGE"),
        (["x.JPEG"], "refused: 'x.JPEG' is not CLASS/IMAGE"),
        (["a/x.JPEG", "a/x.JPEG"], "'a/x.JPEG' occurs twice; remove one"),
    ],
)
def test_names_that_pixels_cannot_hold(tmp_path: Path, names: list[str], message: str) -> None:
    """Names that would not survive are refused before anything is read."""
    sources = [SourceImage(name, str(tmp_path / "none"), 0, 1) for name in names]
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError) as error:
        size_images(sources, PixelPacking(), pool, lambda *step: None)
    assert message in str(error.value)
