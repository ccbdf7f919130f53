"""Predict the classes of images: `python scripts/predict.py --help`, or `metaformer predict --help`."""

from metaformer.commands.predict import main
from metaformer.program import run_program

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
