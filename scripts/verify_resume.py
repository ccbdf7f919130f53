"""Prove on this machine that a run which is killed and goes on ends as one that nothing happened to.

  python scripts/verify_resume.py --steps 20 -- model=poolformer_s12 data.root=/path/to/imagenet
  python scripts/verify_resume.py --steps 20 --ranks 8 -- model=poolformer_s12 data.root=/path/to/imagenet

Trains the given configuration twice for so many steps, in folders of their own: once undisturbed, once killed by
SIGKILL in the middle and started again by the same command. Prints the SHA-256 of what each leaves: weights, average,
optimizer and progress, rows of metrics. Exit code 0: equal bit for bit; 1: not. Nothing goes to wandb.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from metaformer.errors import UserError
from metaformer.runtime import run_program
from metaformer.training.pointers import follow, read_pointer

TRAIN = Path(__file__).parents[1] / "train.py"
OF_THE_CLOCK = ("images_per_second", "data_wait", "memory_gib")  # figures of a row that differ from run to run


def main() -> None:
    """Train twice, compare."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=arguments.folder) as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        _train(arguments, whole)
        _train_and_kill(arguments, killed)
        _train(arguments, killed)
        undisturbed, resumed = hash_run(whole), hash_run(killed)
    hashes = {name: (undisturbed[name], resumed[name]) for name in undisturbed}
    table = Table("part", "undisturbed", "killed and resumed", "")
    for name, (one, other) in hashes.items():
        table.add_row(name, one[:16], other[:16], "equal" if one == other else "DIFFERENT")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if any(one != other for one, other in hashes.values()):
        sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run, 4 or more")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine")
    parser.add_argument("--folder", type=Path, help="where the two run folders are made and removed; default: /tmp")
    parser.add_argument("overrides", nargs="+", help="train.py's, after --")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        raise UserError(f"--steps {arguments.steps}: must be at least 4, to be killed in the middle")
    if arguments.ranks < 1:
        raise UserError(f"--ranks {arguments.ranks}: must be at least 1")
    for name in ("run_dir", "max_steps", "resume"):
        if any(override.lstrip("+").startswith(f"{name}=") for override in arguments.overrides):
            raise UserError(f"{name}=: set by this program; leave it out")
    return arguments


def _command(arguments: argparse.Namespace, run_dir: Path) -> list[str]:
    launcher = [sys.executable]
    if arguments.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    fixed = ["tracking=local", f"run_dir={run_dir}", f"max_steps={arguments.steps}"]
    fixed += ["log_every_steps=1", f"checkpoint.every_steps={max(1, arguments.steps // 4)}"]
    return [*launcher, str(TRAIN), *arguments.overrides, *fixed]


def _train(arguments: argparse.Namespace, run_dir: Path) -> None:
    print(f"training {arguments.steps} steps in {run_dir}", file=sys.stderr, flush=True)
    done = subprocess.run(_command(arguments, run_dir), capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(f"train.py: {(errors or [done.stderr[-500:]])[0].removeprefix('error: ')}")


def _train_and_kill(arguments: argparse.Namespace, run_dir: Path) -> None:
    """SIGKILL to all its processes when two thirds of the steps are logged."""
    print(f"training in {run_dir}, to be killed", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        _command(arguments, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2 * arguments.steps // 3:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed; {_last_checkpoint(run_dir)} is there to go on from", file=sys.stderr, flush=True)
            return
        time.sleep(0.01)
    raise UserError(f"--steps {arguments.steps}: the run ended before it could be killed; give more")


def _last_checkpoint(run_dir: Path) -> str:
    last = read_pointer(run_dir / "checkpoints" / "last")
    return "no checkpoint" if last is None else last.name


def hash_run(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each part of what a run leaves; of values, not of files, which may hold the time."""
    last = follow(run_dir / "checkpoints" / "last")
    hashes = {file.stem: _hash(load_file(file)) for file in sorted(last.glob("*.safetensors"))}
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    hashes |= {name: _hash(trainer[name]) for name in ("optimizer", "scaler", "progress", "loss_sum", "skips")}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    hashes["metrics"] = _hash([{k: v for k, v in row.items() if k not in OF_THE_CLOCK} for row in rows])
    return hashes


def _hash(value: Any) -> str:
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            digest.update(f"{item.dtype} {list(item.shape)}".encode())
            digest.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key, each in item.items():
                digest.update(repr(key).encode())
                add(each)
        elif isinstance(item, list):
            digest.update(str(len(item)).encode())
            for each in item:
                add(each)
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


if __name__ == "__main__":
    run_program(main)
