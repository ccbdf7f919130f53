"""File format of decoded pixels: safetensors with one uint8 tensor [H, W, 3] per image, named CLASS/IMAGE.

The format begins with the length of a JSON header (8 bytes, little endian) and the header, which lists the tensors in
the order in which their bytes follow, without gaps. Its metadata has, in the same order, the sizes of the files that
the images were decoded from and the CRC-32 of their pixels. The safetensors library can read these files, but it does
not report where a tensor is in the file, which cropping an image in place requires.
"""

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from metaformer.data.index.shards import is_member_name
from metaformer.errors import UserError

CHANNELS = 3
ALIGNMENT = 8  # offset of the first pixel in the file, in bytes
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_IMAGES = 200_000  # images per file, so that the header stays far below that limit

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


class PixelEntry(NamedTuple):
    """An image in a file of pixels.

    Attributes:
        name: CLASS/IMAGE.
        height, width: in pixels.
        source_size: size of the encoded image that it was decoded from, in bytes.
        checksum: CRC-32 of the pixels.
    """

    name: str
    height: int
    width: int
    source_size: int
    checksum: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.height * self.width * CHANNELS


class PixelHeader(NamedTuple):
    """The header of a file of pixels.

    Attributes:
        entries: the images, in the order of their pixels.
        first_offset: offset of the first pixel in the file, in bytes.
        resize: length of the short side to which larger images were reduced; None if they have their original size.
    """

    entries: list[PixelEntry]
    first_offset: int
    resize: int | None


def encode_header(entries: Sequence[PixelEntry], resize: int | None) -> bytes:
    """Return the bytes before the first pixel; their number does not depend on the checksums."""
    tensors: dict[str, Any] = {
        _METADATA: {
            "resize": "none" if resize is None else str(resize),
            "source_sizes": " ".join(str(entry.source_size) for entry in entries),
            "crc32": " ".join(f"{entry.checksum:08x}" for entry in entries),
        }
    }
    start = 0
    for entry in entries:
        shape, end = [entry.height, entry.width, CHANNELS], start + entry.size
        tensors[entry.name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def read_header_bytes(path: Path) -> bytes:
    """Return the bytes before the first pixel.

    Raises:
        UserError: the file ends before that.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        prefix = file.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else MAX_HEADER_BYTES + 1
        text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if len(text) != length:
        raise damaged(path, "its header is cut short or damaged")
    return prefix + text


def decode_header(path: Path, content: bytes, file_size: int) -> PixelHeader:
    """Parse a header and check that its entries fill a file of that size exactly.

    Raises:
        UserError: names the file, and the entry that does not fit.
    """
    try:
        tensors = json.loads(content[_LENGTH.size :], object_pairs_hook=_without_duplicates)
        metadata = tensors.pop(_METADATA)
        sizes = [int(size) for size in metadata["source_sizes"].split()]
        checksums = [int(checksum, 16) for checksum in metadata["crc32"].split()]
        resize = None if metadata["resize"] == "none" else int(metadata["resize"])
        rows = list(zip(tensors.items(), sizes, checksums, strict=True))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header is not that of pixels: {error}") from error
    entries, end = [], 0
    for (name, tensor), size, checksum in rows:
        entry = _entry(path, name, tensor, size, checksum)
        if tensor["data_offsets"] != [end, end + entry.size]:
            raise damaged(
                path, f"{name}: {entry.width} x {entry.height} pixels do not fit its {tensor['data_offsets']}"
            )
        end += entry.size
        if len(content) + end > file_size:
            raise damaged(path, f"{name}: ends after the end of the file")
        entries.append(entry)
    if len(content) + end != file_size:
        raise damaged(path, f"{file_size - len(content) - end:,} bytes after its last image")
    return PixelHeader(entries, len(content), resize)


def find_truncated_entry(path: Path) -> str | None:
    """Return the first entry that a truncated file does not contain completely; None if the header is damaged."""
    try:
        header, present = read_header_bytes(path), path.stat().st_size
        tensors = json.loads(header[_LENGTH.size :])
        ends = (
            (name, len(header) + tensor["data_offsets"][1]) for name, tensor in tensors.items() if name != _METADATA
        )
        return next((name for name, end in ends if end > present), None)
    except (UserError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def write_header(file: BinaryIO, entries: Sequence[PixelEntry], resize: int | None) -> None:
    """Write the header at the beginning of an open file."""
    file.seek(0)
    file.write(encode_header(entries, resize))


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file that cannot be used."""
    return UserError(f"{path}: {what}; copy it again, or prepare the data again")


def _entry(path: Path, name: str, tensor: Any, source_size: int, checksum: int) -> PixelEntry:
    try:
        height, width, channels = tensor["shape"]
        dtype, offsets = tensor["dtype"], tensor["data_offsets"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{name}: not an image of uint8 [height, width, 3]") from error
    sides_are_counts = all(type(side) is int and side > 0 for side in (height, width))
    if dtype != "U8" or channels != CHANNELS or not sides_are_counts or not isinstance(offsets, list):
        raise damaged(path, f"{name}: not an image of uint8 [height, width, 3]")
    if not is_member_name(name):
        raise damaged(path, f"refused: {name!r} is not CLASS/IMAGE")
    return PixelEntry(name, height, width, source_size, checksum)


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found
