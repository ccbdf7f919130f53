"""Export a trained network: `python scripts/export.py --help`, or `metaformer export --help`."""

from metaformer.commands.export import main
from metaformer.program import run_program

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
