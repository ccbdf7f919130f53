"""Tests of the scan that decodes every image."""

import random
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.load.bad_file import BAD_FILE
from metaformer.data.load.image_file import FORMATS
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.plan.plan import EvaluationPlan
from metaformer.data.prepare.scan_images import examine, scan_images
from tests.data.conftest import picture

Write = Callable[[Path], object]


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(80, 60, 0).save(path, exif=exif)


def png_of_16_bit_colours(path: Path) -> None:
    """Write a 16-bit RGB PNG by hand, because PIL cannot write one."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + bytes(6 * 80) for _ in range(60))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 80, 60, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


DECODE: dict[str, tuple[Write, tuple[int, int, str, str], str]] = {
    "plain": (lambda path: picture(80, 60, 0).save(path), (80, 60, "RGB", "JPEG"), ""),
    "gray": (lambda path: picture(80, 60, 0).convert("L").save(path), (80, 60, "L", "JPEG"), "gray"),
    "CMYK": (lambda path: picture(80, 60, 0).convert("CMYK").save(path), (80, 60, "CMYK", "JPEG"), "CMYK"),
    "PNG": (lambda path: picture(80, 60, 0).save(path, "PNG"), (80, 60, "RGB", "PNG"), "PNG named as a JPEG"),
    "GIF": (
        lambda path: picture(80, 60, 0).convert("P").save(path, "GIF"), (80, 60, "P", "GIF"), "GIF named as a JPEG, P"
    ),
    "16-bit gray": (
        lambda path: Image.fromarray(np.zeros((60, 80), np.uint16)).save(path, "PNG"),
        (80, 60, "I;16", "PNG"),
        "PNG named as a JPEG, 16-bit",
    ),
    "16-bit colours": (png_of_16_bit_colours, (80, 60, "RGB", "PNG"), "PNG named as a JPEG, 16-bit"),
    "1x1": (lambda path: picture(80, 60, 0).resize((1, 1)).save(path), (1, 1, "RGB", "JPEG"), "tiny"),
    "rotated": (turned, (80, 60, "RGB", "JPEG"), "EXIF-rotated"),
    "no EXIF": (
        lambda path: picture(80, 60, 0).save(path, "PNG", exif=b"Exif\0\0no TIFF header"),
        (80, 60, "RGB", "PNG"),
        "PNG named as a JPEG",
    ),
    "bad EXIF": (
        lambda path: picture(80, 60, 0).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01"),
        (80, 60, "RGB", "JPEG"),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODE)
def test_what_decodes_is_described(tmp_path: Path, kind: str) -> None:
    """A file that PIL decodes is ok; its stored size, mode, format and differences from a plain RGB JPEG are listed."""
    write, shape, unusual = DECODE[kind]
    file = tmp_path / "x.JPEG"
    write(file)
    assert examine("a/x.JPEG", lambda: np.fromfile(file, np.uint8)) == (
        "a/x.JPEG",
        *shape,
        file.stat().st_size,
        1,
        unusual,
        "",
    )


def cut(share: float, **options: bool) -> Write:
    def write(path: Path) -> None:
        picture(800, 600, 0).save(path, "JPEG", **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


BROKEN: dict[str, tuple[Write, str]] = {
    "cut short": (cut(0.5), "truncated"),
    "cut at its end": (cut(0.98), "truncated"),
    "progressive, cut at its end": (cut(0.98, progressive=True), "truncated"),
    "header alone": (cut(0.01), "Truncated File Read"),
    "empty": (Path.touch, "empty file"),
    "text": (lambda path: path.write_text("<html>404</html>"), "not in a supported image format"),
    "folder": (Path.mkdir, "Is a directory"),
    "gone": (lambda path: None, "No such file or directory"),
    "huge": (
        lambda path: path.write_bytes(
            b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6)
        ),
        "60,000 x 60,000 pixels, more than loader.max_pixels=100000000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_decode_has_a_reason(tmp_path: Path, kind: str) -> None:
    """A file that does not decode completely, even at an eighth of its size, is not ok, with a one-line reason."""
    write, reason = BROKEN[kind]
    write(tmp_path / "x.JPEG")
    image = examine("a/x.JPEG", lambda: np.fromfile(tmp_path / "x.JPEG", np.uint8))
    assert not image.ok
    assert reason in image.reason
    assert "\n" not in image.reason


@pytest.mark.parametrize("format_", FORMATS)
def test_damaged_images_are_read_or_have_a_reason(format_: str) -> None:
    """After any of 150 random changes to a file, the scan and both readers give an image or one of BAD_FILE."""
    buffer, rng = BytesIO(), random.Random(0)
    picture(40, 30, 0).save(buffer, format_)
    plan = EvaluationPlan(num_samples=1, batch_size=1, rank=0, world_size=1, image_size=32, crop_pct=0.9).batch(0, 0)
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.choice((1, 3, 10))):
            content[rng.randrange(min(len(content), rng.choice((60, 10**6))))] = rng.randrange(256)
        encoded = np.frombuffer(content, np.uint8)
        with warnings.catch_warnings(action="ignore"):
            assert examine("x", encoded.view).reason.isprintable()
            for reader in (PilReader(max_pixels=10**6), TorchReader(max_pixels=10**6)):
                with suppress(*BAD_FILE):
                    reader.read(encoded, plan, 0)


def test_all_images_in_order(own_root: Path) -> None:
    """Two processes return each image of the split once, in the index's order, and report their progress."""
    (own_root / "train" / "b" / "gray.JPEG").write_bytes(b"")
    index, progress = load_index(own_root, "train"), list[tuple[str, int, int]]()
    found = list(scan_images(index, "train", 2, lambda *step: progress.append(step)))
    assert [own_root / image.path for image in found] == [index.path(sample) for sample in range(13)]
    assert [image.path for image in found if not image.ok] == ["train/b/gray.JPEG"]
    assert progress[-1] == ("decoding train", 13, 13)
    assert len(progress) > 2
