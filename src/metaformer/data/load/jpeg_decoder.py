"""Decoding of JPEGs on a CPU with the pixels of libjpeg-turbo, which are PIL's.

nvImageCodec decodes only the region that is needed: it skips the rows below it, and the transforms of the blocks around
it. Where it is not installed, torchcodec decodes whole images; with versions of torch that are older than torchcodec's
image decoders, torchvision does, whose own are deprecated.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from threading import local
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaformer.data.load.image_file import Encoded, jpeg_header
from metaformer.data.plan.geometry import Box

DecodeRegion = Callable[[Encoded, Box], Tensor | None]  # None for what PIL has to decode: damaged files, for example

END = b"\xff\xd9"  # the marker that ends a JPEG
CPU_ONLY = -99999  # nvImageCodec's number for no device

_own = local()  # of each thread: its decoder


def is_installed(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not installed
        return False


def region_decoder() -> DecodeRegion:
    """Return the fastest decoder that is installed; it decodes a region of a gray or RGB JPEG to uint8 [3, H, W].

    The decoder belongs to the thread that calls, which gets the same one each time; call this after forking.
    """
    if not hasattr(_own, "decoder"):
        _own.decoder = _fastest_decoder()
    decoder: DecodeRegion = _own.decoder
    return decoder


def _fastest_decoder() -> DecodeRegion:
    if is_installed("nvidia.nvimgcodec"):
        return decode_with_nvimagecodec()
    if is_installed("torchcodec.decoders"):
        with suppress(ImportError, OSError, RuntimeError):  # older than 0.16, or made for another torch
            return decode_with_torchcodec()
    return decode_with_torchvision()


def decode_with_nvimagecodec() -> DecodeRegion:
    """Return a decoder that uses nvImageCodec's CPU backend."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # errors are reported by PIL, in one line
    from nvidia import nvimgcodec

    backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    decoder = nvimgcodec.Decoder(device_id=CPU_ONLY, max_num_cpu_threads=1, backends=backends)
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def decode(encoded: Encoded, box: Box) -> Tensor | None:
        if encoded[-2:].tobytes() != END:  # truncated, which a region near the top would not show
            return None
        bottom_right = (box.top + box.height, box.left + box.width)
        try:
            whole = nvimgcodec.CodeStream(encoded)
            region = whole.get_sub_code_stream(0, region=nvimgcodec.Region(box.top, box.left, *bottom_right))
            image: Any = decoder.decode(region, params=params)
        except RuntimeError:
            return None
        return None if image is None else torch.from_numpy(np.asarray(image.cpu())).permute(2, 0, 1)

    return decode


def decode_with_torchcodec() -> DecodeRegion:
    """Return a decoder that uses torchcodec.

    Raises:
        ImportError, OSError, RuntimeError: its version has no image decoders, or was made for another torch.
    """
    from torchcodec.decoders import decode_jpeg

    decode = _cut_out_of_whole(lambda encoded: decode_jpeg(encoded, mode="UNCHANGED"))

    def decode_unless_rotated(encoded: Encoded, box: Box) -> Tensor | None:
        header = jpeg_header(encoded)
        return None if header is None or header.exif else decode(encoded, box)  # torchcodec rotates by EXIF

    return decode_unless_rotated


def decode_with_torchvision() -> DecodeRegion:
    """Return a decoder that uses torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return _cut_out_of_whole(lambda encoded: decode_jpeg(encoded, ImageReadMode.UNCHANGED))


def _cut_out_of_whole(decode_whole: Callable[[Tensor], Tensor]) -> DecodeRegion:
    def decode(encoded: Encoded, box: Box) -> Tensor | None:
        try:
            image = decode_whole(torch.from_numpy(encoded))
        except RuntimeError:
            return None
        region = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
        return region.expand(3, -1, -1) if image.shape[0] in (1, 3) else None

    return decode


DECODERS: dict[str, Callable[[], DecodeRegion]] = {
    "nvImageCodec": decode_with_nvimagecodec,
    "torchcodec": decode_with_torchcodec,
    "torchvision": decode_with_torchvision,
}
