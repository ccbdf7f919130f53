"""Exceptions that unreadable image files raise, and messages for them."""

from PIL import Image, UnidentifiedImageError

from metaformer.errors import one_line, printable

# Exceptions that PIL and torchvision raise for files that they cannot read.
BAD_FILE = (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError)


class DamagedShard(OSError):
    """A file of packed images or pixels that changed, or does not have its checksum; the message says how to fix it."""


def describe_bad_file(location: str, error: BaseException) -> str:
    """Return the one-line message about an image at `location` that cannot be read."""
    if isinstance(error, DamagedShard):
        return f"{location}: {error}"
    return (
        f"{location}: cannot be read as an image ({reason(error)}); repair or remove the file, or exclude it with "
        "data.quarantine=FILE, a list that scripts/scan_data.py writes"
    )


def reason(error: BaseException) -> str:
    """Return the reason why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not in a supported image format: JPEG, PNG, GIF, BMP, TIFF, WebP, PPM"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(one_line(error))
