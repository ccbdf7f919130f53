"""Tests of the decoders of JPEGs: PIL's pixels in every region, the same errors, and the choice between them."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metaformer.data.load import jpeg_decoder
from metaformer.data.load.bad_file import BAD_FILE
from metaformer.data.load.image_file import Encoded
from metaformer.data.load.jpeg_decoder import DECODERS
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.plan.geometry import Box
from metaformer.data.plan.plan import EvaluationPlan
from tests.data.conftest import picture

every_decoder = pytest.mark.parametrize("name", DECODERS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision are deprecated:DeprecationWarning"
)


def jpeg(width: int, height: int, mode: str = "RGB", **options: Any) -> Encoded:
    buffer = BytesIO()
    picture(width, height, seed=width).convert(mode).save(buffer, "JPEG", **options)
    return np.frombuffer(bytearray(buffer.getvalue()), np.uint8)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS = {
    "4:2:0": jpeg(203, 151),
    "4:2:2": jpeg(203, 151, subsampling="4:2:2"),
    "4:4:4": jpeg(203, 151, subsampling="4:4:4"),
    "gray": jpeg(203, 151, "L"),
    "progressive": jpeg(203, 151, progressive=True),
    "restart markers": jpeg(203, 151, restart_marker_rows=1),
    "stored as RGB": jpeg(203, 151, keep_rgb=True),
    "EXIF rotation": jpeg(203, 151, exif=turned()),
    "low quality": jpeg(203, 151, quality=20),
}


def boxes(width: int, height: int) -> Iterator[Box]:
    """Yield the whole image, its edges and corners, and random regions, down to one pixel."""
    yield Box(0, 0, width, height)
    yield from (Box(0, 0, 1, 1), Box(width - 1, height - 1, 1, 1), Box(0, height - 9, width, 9))
    rng = np.random.default_rng(0)
    for _ in range(40):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        yield Box(left, top, int(rng.integers(1, width - left + 1)), int(rng.integers(1, height - top + 1)))


@every_decoder
@pytest.mark.parametrize("kind", KINDS)
def test_every_region_has_pils_pixels(name: str, kind: str) -> None:
    """Each region equals PIL's image in every value, whatever the subsampling, and is not rotated."""
    decode = DECODERS[name]()
    with Image.open(BytesIO(KINDS[kind].tobytes())) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    for box in boxes(203, 151):
        region = decode(KINDS[kind], box)
        if (name, kind) == ("torchcodec", "EXIF rotation"):  # which torchcodec would rotate
            assert region is None
            continue
        assert region is not None
        right, bottom = box.corners[2:]
        assert torch.equal(region, expected[:, box.top : bottom, box.left : right]), box


@every_decoder
def test_later_regions_do_not_overwrite_earlier_ones(name: str) -> None:
    """A decoder's results stay as they are, and can be written."""
    decode = DECODERS[name]()
    regions = [decode(KINDS["4:2:0"], box) for box in boxes(203, 151)]
    copies = [region.clone() for region in regions if region is not None]
    decode(KINDS["4:4:4"], Box(0, 0, 203, 151))
    assert all(torch.equal(*pair) for pair in zip(regions, copies, strict=True))  # type: ignore[arg-type]


@every_decoder
def test_truncated_files_are_not_decoded(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that was cut anywhere gives None, even if the region is before the cut, and prints nothing."""
    decode, whole = DECODERS[name](), KINDS["4:2:0"]
    for end in (0, 1, 2, 50, 400, len(whole) // 2, len(whole) - 100, len(whole) - 2, len(whole) - 1):
        cut = np.array(whole[:end])
        assert decode(cut, Box(0, 0, 10, 1)) is None, end
        zeros = np.zeros_like(whole)
        zeros[:end] = whole[:end]
        assert decode(zeros, Box(0, 0, 10, 1)) is None or name != "nvImageCodec", end
    assert capfd.readouterr() == ("", "")


@every_decoder
def test_damage_does_not_crash(name: str) -> None:
    """A bit that flips anywhere gives pixels or None, never another exception or the end of the process."""
    decode, whole = DECODERS[name](), jpeg(64, 48)
    rng = np.random.default_rng(1)
    for position in [*range(0, 700, 3), *rng.integers(700, len(whole), 100).tolist()]:
        damaged = whole.copy()
        damaged[position] ^= 1 << int(rng.integers(8))
        region = decode(damaged, Box(8, 8, 20, 20))
        assert region is None or region.dtype == torch.uint8


@every_decoder
def test_errors_are_those_of_pil(name: str) -> None:
    """The torch reader raises PIL's error for a truncated file with each decoder."""
    plan = EvaluationPlan(num_samples=1, batch_size=1, rank=0, world_size=1, image_size=40, crop_pct=1.0).batch(0, 0)
    for end, message in ((3000, "image file is truncated"), (len(KINDS["4:2:0"]) - 2, "image file is truncated")):
        with pytest.raises(BAD_FILE, match=message):
            TorchReader(decoder=DECODERS[name]()).read(KINDS["4:2:0"][:end].copy(), plan, 0)


def test_the_best_decoder_that_is_installed_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvImageCodec, then torchcodec, then torchvision, also if torchcodec does not fit the installed torch."""
    choose, chosen = jpeg_decoder._fastest_decoder, []
    for function in DECODERS.values():
        monkeypatch.setattr(jpeg_decoder, function.__name__, lambda name=function.__name__: chosen.append(name))
    choose()
    found = jpeg_decoder.is_installed
    monkeypatch.setattr(jpeg_decoder, "is_installed", lambda module: "nv" not in module and found(module))
    choose()
    monkeypatch.setattr(jpeg_decoder, "decode_with_torchcodec", DECODERS["torchcodec"])
    older = ModuleType("torchcodec.decoders")  # without decode_jpeg
    older.__spec__ = ModuleSpec(older.__name__, None)
    monkeypatch.setitem(sys.modules, older.__name__, older)
    choose()
    monkeypatch.setattr(jpeg_decoder, "is_installed", lambda module: False)
    choose()
    names = ["decode_with_nvimagecodec", "decode_with_torchcodec", "decode_with_torchvision", "decode_with_torchvision"]
    assert chosen == names


def test_what_is_installed() -> None:
    """A module of a package that is not there is not installed."""
    assert jpeg_decoder.is_installed("torchvision.io")
    assert not jpeg_decoder.is_installed("no_such_package.module")
