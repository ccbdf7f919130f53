"""What a file that is no image raises, and what a user is told of it."""

from pathlib import Path

from PIL import Image

# What PIL and torchvision raise for files that they cannot read.
BAD_FILE = (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError)


def describe_bad_file(path: Path, error: BaseException) -> str:
    """The line for a user about a file that cannot be read."""
    reason = " ".join(str(error).split())
    return (
        f"{path}: cannot be read as an image ({reason}); repair or remove the file, "
        "or leave it out: data.quarantine=FILE, a list that scripts/scan_data.py writes"
    )
