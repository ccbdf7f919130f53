"""Measure the time of a training step for several numbers of ranks and several ways of exchanging gradients.

  python scripts/benchmark_scaling.py --ranks 1 2 4

Each number of ranks runs in separate processes (measure_scaling.py), with a network on random images.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metaformer.errors import UserError
from metaformer.files import check_output, write_text_atomically
from metaformer.program import run_program


def main() -> None:
    """Measure and print a table."""
    arguments = _parse()
    found = [_measure(ranks, arguments) for ranks in arguments.ranks]
    _print(found)
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(found, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="poolformer_s12")
    parser.add_argument("--batch", type=int, default=8, help="images of a rank (8)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="on this machine (1 2 4)")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="in a round (3)")
    parser.add_argument("--rounds", type=int, default=3, help="whose median counts (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if min(*arguments.ranks, arguments.batch, arguments.steps, arguments.rounds) < 1:
        parser.error("--ranks, --batch, --steps and --rounds must be at least 1")
    if arguments.json is not None:
        check_output(f"--json={arguments.json}", arguments.json)
    return arguments


def _measure(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One number of ranks, in processes of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    options = [f"--{name}={getattr(arguments, name.replace('-', '_'))}"
               for name in ("model", "image-size", "batch", "steps", "rounds")]  # fmt: skip
    command = [*launcher, str(Path(__file__).with_name("measure_scaling.py")), *options]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror: " in line] or ["no message"]
        raise UserError(f"{ranks} ranks: measuring ended with exit code {done.returncode}: {errors[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _print(found: list[dict[str, Any]]) -> None:
    table = Table("ms a step", *(f"{row['ranks']} ranks" for row in found))
    for name in max((row["seconds"] for row in found), key=len):
        table.add_row(name, *(f"{1000 * row['seconds'][name]:.0f}" if name in row["seconds"] else "-" for row in found))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    run_program(main)
