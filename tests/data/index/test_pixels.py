"""Tests of the index of decoded pixels: the folder's index, other readers, and damaged or changed files."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from metaformer.data.index.config import DataConfig, IndexCheck
from metaformer.data.index.image_index import find_images, load_index
from metaformer.data.index.pixel_file import PixelEntry, encode_header
from metaformer.data.index.quarantine import drop_quarantined, write_quarantine
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.prepare.scan_images import scan_images
from metaformer.errors import UserError
from tests.data.conftest import decode

FIRST = "pixels-000000.safetensors"


def test_the_index_is_the_folders(image_root: Path, pixel_root: Path) -> None:
    """Names, labels, classes and fingerprint are the folder's; the pixels are PIL's, and have their CRC-32."""
    for split in ("train", "val"):
        files, pixels = load_index(image_root, split), load_index(pixel_root, split)
        assert pixels.fingerprint == files.fingerprint == find_images(pixel_root / split).fingerprint
        assert pixels.classes == files.classes
        assert np.array_equal(pixels.paths, files.paths)
        assert np.array_equal(pixels.labels, files.labels)
        with closing(ImageBytes(pixels)) as stored:
            for sample in range(len(files)):
                with Image.open(files.path(sample)) as image:
                    assert np.array_equal(stored.check(sample), np.asarray(image.convert("RGB")))


def test_the_safetensors_library_reads_the_same(pixel_root: Path) -> None:
    """The format is what its own library says it is; rows are read without the rest."""
    index = load_index(pixel_root, "train")
    read: dict[str, Any] = {}
    for file in sorted((pixel_root / "train").glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            read |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            name = next(iter(tensors.keys()))
            assert np.array_equal(tensors.get_slice(name)[3:7], read[name][3:7])
    with closing(ImageBytes(index)) as stored:
        assert sorted(read) == sorted(index.name(sample) for sample in range(len(index)))
        assert all(np.array_equal(read[index.name(sample)], stored.read(sample)) for sample in range(len(index)))


def test_reduced_images_are_another_data_set(image_root: Path, tmp_path: Path) -> None:
    """Another --resize gives another fingerprint, even where no image is larger."""
    found = {
        resize: load_index(decode(image_root, tmp_path / str(resize), resize=resize), "train").fingerprint
        for resize in (None, 32, 64, 1000, 1001)
    }
    assert len(set(found.values())) == len(found)


def test_quarantine_selects_from_pixels(own_root: Path, own_pixels: Path) -> None:
    """A list of SPLIT/CLASS/IMAGE excludes the same images from pixels as from the folder."""
    file = own_root.parent / "broken.txt"
    write_quarantine(file, ["train/a/0.JPEG", "train/b/gray.JPEG"])
    folder, pixels = (
        drop_quarantined(load_index(root, "train"), DataConfig(root=str(root), quarantine=str(file)), "train")
        for root in (own_root, own_pixels)
    )
    assert pixels.fingerprint == folder.fingerprint
    with closing(ImageBytes(pixels)) as stored:
        for sample in range(len(folder)):
            with Image.open(folder.path(sample)) as image:
                assert np.array_equal(stored.check(sample), np.asarray(image.convert("RGB")))


def test_a_cached_scan_is_used_until_a_file_changes(own_pixels: Path) -> None:
    """The scan is cached; another time of a file makes a new one."""
    load_index(own_pixels, "train")
    (cached,) = own_pixels.glob(".metaformer/train-*")
    load_index(own_pixels, "train")
    assert list(own_pixels.glob(".metaformer/train-*")) == [cached]
    os.utime(own_pixels / "train" / FIRST, ns=(10**18, 10**18))
    load_index(own_pixels, "train")
    assert list(own_pixels.glob(".metaformer/train-*")) != [cached]


def flip(file: Path, position: int) -> None:
    """Flip a bit without a trace in the file's size or time."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_flipped_bit_is_named(own_pixels: Path) -> None:
    """data.check=files and scan_data.py name the file and the image; the other images are good."""
    index = load_index(own_pixels, "train")
    file, offset, size = index.byte_range(2)
    flip(file, offset + size // 2)
    place = f"{file}: {index.name(2)}"
    with pytest.raises(UserError) as caught:
        load_index(own_pixels, "train", IndexCheck.files)
    assert str(caught.value).startswith(f"{place}: its pixels have changed (they do not have their CRC-32); copy it")
    found = list(scan_images(load_index(own_pixels, "train"), "train", 1, lambda *step: None))
    assert [image.path for image in found if not image.ok] == [f"train/{index.name(2)}"]
    assert found[2].reason.startswith("its pixels have changed")
    assert {(image.mode, image.format) for image in found if image.ok} == {("RGB", "pixels")}
    flip(file, offset + size // 2)
    load_index(own_pixels, "train", IndexCheck.files)


def test_every_bit_of_the_header_is_checked(own_pixels: Path) -> None:
    """A bit that flips in a header is found by the next scan, whatever it means."""
    file = own_pixels / "train" / FIRST
    load_index(own_pixels, "train")
    for position in (0, 6, 8, 20, 150, 300):
        flip(file, position)
        with pytest.raises(
            UserError, match=rf"^{file}: its header (is cut short or damaged|does not have the SHA-256)"
        ):
            find_images(own_pixels / "train")
        flip(file, position)
    find_images(own_pixels / "train")


def truncate_in_an_image(folder: Path) -> str:
    index = load_index(folder.parent, "train")
    file, offset, _ = index.byte_range(1)
    os.truncate(file, offset + 10)
    return f"{file}: {index.name(1)}: truncated or changed: "


def truncate_in_the_header(folder: Path) -> str:
    os.truncate(folder / FIRST, 40)
    return f"{folder / FIRST}: truncated or changed: 40 bytes, not the "


def empty(folder: Path) -> str:
    os.truncate(folder / FIRST, 0)
    return f"{folder / FIRST}: truncated or changed: 0 bytes, not the "


def append(folder: Path) -> str:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"\0")
    return f"{folder / FIRST}: truncated or changed: "


def remove_file(folder: Path) -> str:
    (folder / FIRST).unlink()
    return f"{folder / FIRST}: missing; pixels.json lists "


def remove_manifest(folder: Path) -> str:
    (folder / "pixels.json").unlink()
    return f"{folder / 'pixels.json'}: missing, so files may be missing too"


def damage_manifest(folder: Path) -> str:
    (folder / "pixels.json").write_text('{"files": [[1, 2, 3, 4]]}')
    return f"{folder / 'pixels.json'}: damaged; copy it again"


def fifo(folder: Path) -> str:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)
    return f"{folder / FIRST}: a FIFO, socket or device"


def one_more(folder: Path) -> str:
    (folder / "pixels-000099.safetensors").touch()
    return f"{folder / 'pixels-000099.safetensors'}: beside pixels, but not listed"


@pytest.mark.parametrize(
    "spoil",
    [truncate_in_an_image, truncate_in_the_header, empty, append, remove_file, remove_manifest, damage_manifest, fifo,
     one_more],
)  # fmt: skip
def test_damaged_folders(own_pixels: Path, spoil: Callable[[Path], str]) -> None:
    """One line names the file, and the first image that is lost, and says what to do."""
    message = spoil(own_pixels / "train")
    for find in (lambda: load_index(own_pixels, "train"), lambda: find_images(own_pixels / "train")):
        with pytest.raises(UserError) as caught:
            find()
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def write_by_hand(folder: Path, header: bytes, pixels: bytes) -> None:
    """Write a file and a manifest that agree, whatever they contain."""
    (folder / FIRST).write_bytes(header + pixels)
    digests = [hashlib.sha256(part).hexdigest() for part in (header, header + pixels)]
    (folder / "pixels.json").write_text(json.dumps({"files": [[1, len(header + pixels), *digests]]}))


def header_of(tensors: str, metadata: str = '"__metadata__":{"resize":"none","source_sizes":"9","crc32":"0"}') -> bytes:
    text = f"{{{metadata},{tensors}}}".encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ('"a/x":{"dtype":"U8","shape":[2,3,3],"data_offsets":[0,12]}', "a/x: 3 x 2 pixels do not fit its [0, 12]"),
        ('"a/x":{"dtype":"U8","shape":[2,2,3],"data_offsets":[3,15]}', "a/x: 2 x 2 pixels do not fit its [3, 15]"),
        ('"a/x":{"dtype":"U8","shape":[9,9,3],"data_offsets":[0,243]}', "a/x: ends after the end of the file"),
        ('"a/x":{"dtype":"U8","shape":[1,1,3],"data_offsets":[0,3]}', "9 bytes after its last image"),
        ('"a/x":{"dtype":"U8","shape":[2,2,1],"data_offsets":[0,4]}', "a/x: not an image of uint8 [height, width, 3]"),
        ('"a/x":{"dtype":"F32","shape":[1,1,3],"data_offsets":[0,12]}', "a/x: not an image of uint8"),
        ('"a/x":{"dtype":"U8","shape":[-2,-2,3],"data_offsets":[0,12]}', "a/x: not an image of uint8"),
        ('"a/x":{"dtype":"U8","shape":[0,2,3],"data_offsets":[0,0]}', "a/x: not an image of uint8"),
        ('"a/x":{"dtype":"U8","shape":"abc","data_offsets":[0,12]}', "a/x: not an image of uint8"),
        ('"a/x":7', "a/x: not an image of uint8"),
        ('"../x":{"dtype":"U8","shape":[2,2,3],"data_offsets":[0,12]}', "refused: '../x' is not CLASS/IMAGE"),
        ('"x":{"dtype":"U8","shape":[2,2,3],"data_offsets":[0,12]}', "refused: 'x' is not CLASS/IMAGE"),
        ('"a/x":1,"a/x":2', "its header is not that of pixels: 'a/x' occurs twice"),
    ],
)
def test_entries_that_do_not_fit(tmp_path: Path, tensors: str, message: str) -> None:
    """A header whose entries do not match its file is refused with the entry's name, even if the digests agree."""
    (tmp_path / "train").mkdir()
    write_by_hand(tmp_path / "train", header_of(tensors), bytes(12))
    with pytest.raises(UserError) as caught:
        find_images(tmp_path / "train")
    assert str(caught.value).startswith(f"{tmp_path / 'train' / FIRST}: {message}")
    assert "\n" not in str(caught.value)


def test_the_same_by_hand_is_read(tmp_path: Path) -> None:
    """Files of write_by_hand and encode_header are accepted if nothing is wrong with them."""
    (tmp_path / "train").mkdir()
    write_by_hand(tmp_path / "train", encode_header([PixelEntry("a/ü.png", 2, 2, 9, 0)], None), bytes(12))
    assert find_images(tmp_path / "train").name(0) == "a/ü.png"


@pytest.mark.parametrize(
    "metadata", ['"x":1', '"__metadata__":{}', '"__metadata__":{"resize":"none"}', '"__metadata__":7']
)
def test_other_safetensors_are_refused(tmp_path: Path, metadata: str) -> None:
    """A file of weights, for example, is not taken for pixels."""
    (tmp_path / "train").mkdir()
    tensor = '"a/x":{"dtype":"U8","shape":[2,2,3],"data_offsets":[0,12]}'
    write_by_hand(tmp_path / "train", header_of(tensor, metadata), bytes(12))
    with pytest.raises(UserError, match=rf"^{tmp_path / 'train' / FIRST}: its header is not that of pixels"):
        find_images(tmp_path / "train")
