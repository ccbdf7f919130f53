"""What a file that is no image raises, and what a user is told of it."""

from PIL import Image, UnidentifiedImageError

from metaformer.errors import one_line, printable

# What PIL and torchvision raise for files that they cannot read.
BAD_FILE = (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError)


def describe_bad_file(place: str, error: BaseException) -> str:
    """The line for a user about an image that cannot be read, which lies at `place`."""
    return (
        f"{place}: cannot be read as an image ({reason(error)}); repair or remove the file, "
        "or leave it out: data.quarantine=FILE, a list that scripts/scan_data.py writes"
    )


def reason(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a kind that is read: JPEG, PNG, GIF, BMP, TIFF, WebP, PPM"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(one_line(error))
