"""Prepare a data set: `python scripts/prepare_data.py --help`, or `metaformer prepare --help`."""

from metaformer.commands.prepare import main
from metaformer.program import run_program

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
