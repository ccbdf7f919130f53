"""How a training step grows with the number of ranks, by each way of exchanging gradients, beside what a model says.

  python scripts/benchmark_scaling.py --ranks 1 2 4
  python scripts/benchmark_scaling.py --project --model poolformer_s12 --batch 128 --step-seconds 0.1

Measured is a step of the network on random images (measure_scaling.py, in processes of its own for each number of
ranks). --project measures nothing: it prints the model's table for 8 to 1,024 GPUs (metaformer/reporting/scaling.py),
from the time of a step on one of them and the speeds of links; with --global-batch, for a batch that does not grow.
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
from metaformer.models import create_model
from metaformer.program import run_program
from metaformer.reporting.scaling import JPEG_BYTES, LR_PER_IMAGE, Links, Work, predict

ALONE, ALL_REDUCE = "no exchange", "all-reduce alone"
PROJECTED = (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Measure or project, and print a table."""
    arguments = _parse()
    if arguments.project:
        _project(arguments)
        return
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
    parser.add_argument("--project", action="store_true", help="the model's table, nothing measured")
    parser.add_argument("--step-seconds", type=float, help="of one GPU, without an exchange")
    parser.add_argument("--fixed-seconds", type=float, default=0.0, help="of it, what fewer images do not shorten (0)")
    parser.add_argument("--global-batch", type=int, help="images of all GPUs; default: --batch times the GPUs")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--within-node", type=float, default=200, metavar="GB/s", help="of each GPU (200)")
    parser.add_argument("--between-nodes", type=float, default=50, metavar="GB/s", help="of each node (50)")
    parser.add_argument("--latency", type=float, default=10e-6, metavar="SECONDS", help="of a hop (1e-5)")
    arguments = parser.parse_args()
    if arguments.project and not (arguments.step_seconds and arguments.step_seconds > 0):
        parser.error("--project needs --step-seconds, of one GPU")
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
    table.add_row("model: as train.py", *(f"{1000 * modelled(row):.0f}" for row in found))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def modelled(row: dict[str, Any]) -> float:
    """What the model makes of a measured step without exchange and a measured exchange, where both need the CPU."""
    seconds = row["seconds"]
    return float(seconds[ALONE] + (seconds[ALL_REDUCE] if row["ranks"] > 1 else 0))


def _project(arguments: argparse.Namespace) -> None:
    parameters = sum(p.numel() for p in create_model(arguments.model, 1000).parameters())
    links = Links(
        arguments.gpus_per_node, 1e9 * arguments.within_node, 1e9 * arguments.between_nodes, arguments.latency
    )
    table = Table("GPUs", "batch", "a GPU's", "lr", "exchange ms", "step ms", "images/s", "efficiency", "reading GB/s")
    fixed, of_images = arguments.fixed_seconds, arguments.step_seconds - arguments.fixed_seconds
    ideal = arguments.batch / arguments.step_seconds
    for gpus in PROJECTED:
        batch = arguments.global_batch or gpus * arguments.batch
        compute = fixed + of_images * batch / gpus / arguments.batch
        step = predict(Work(compute, 4.0 * parameters), links, gpus)
        speed = batch / step.total
        times = (f"{1000 * step.exchange:.1f}", f"{1000 * step.total:.1f}")
        speeds = (f"{speed:,.0f}", f"{speed / gpus / ideal:.0%}", f"{speed * JPEG_BYTES / 1e9:.1f}")
        table.add_row(f"{gpus}", f"{batch:,}", f"{batch / gpus:g}", f"{LR_PER_IMAGE * batch:.2g}", *times, *speeds)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    run_program(main)
