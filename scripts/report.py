"""Write the report of runs: `python scripts/report.py --help`, or `metaformer report --help`."""

from metaformer.commands.report import main
from metaformer.program import run_program

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
