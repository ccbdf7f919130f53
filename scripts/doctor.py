"""Check a machine before training: `python scripts/doctor.py --help`, or `metaformer doctor --help`."""

from metaformer.commands.doctor import main
from metaformer.program import run_program

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
