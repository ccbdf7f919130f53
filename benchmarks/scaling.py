"""Measure the time of a training step for several numbers of ranks and strategies of exchanging gradients.

  python -m benchmarks.scaling --ranks 1 2 4

Each number of ranks runs in separate processes (measure_scaling.py), with a network on random images in fp32.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness import as_options, check_outputs, console, measure, write_json
from metaformer.program import run_program

OPTIONS = ("model", "image_size", "batch", "steps", "rounds")


def main() -> None:
    """Measure and print a table."""
    arguments = _parse()
    found = [_measure(ranks, arguments) for ranks in arguments.ranks]
    _print(found)
    write_json(arguments.json, {"found": found})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="poolformer_s12")
    parser.add_argument("--batch", type=int, default=8, help="images per rank (8)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes on this machine (1 2 4)")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="steps per round (3)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; their median is reported (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    if min(*arguments.ranks, arguments.batch, arguments.steps, arguments.rounds) < 1:
        parser.error("--ranks, --batch, --steps and --rounds must be at least 1")
    check_outputs(arguments, "json")
    return arguments


def _measure(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return measure(f"{ranks} ranks", "measure_scaling", as_options(arguments, *OPTIONS), environment, ranks)


def _print(found: list[dict[str, Any]]) -> None:
    table = Table("ms per step", *(f"{row['ranks']} ranks" for row in found))
    for name in max((row["seconds"] for row in found), key=len):
        table.add_row(name, *(f"{1000 * row['seconds'][name]:.0f}" if name in row["seconds"] else "-" for row in found))
    console().print(table)


if __name__ == "__main__":
    run_program(main)
