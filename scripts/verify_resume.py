"""Verify on this machine that a run that is killed and resumed ends exactly like an undisturbed run.

  python scripts/verify_resume.py --steps 20 -- model=poolformer_s12 data.root=/path/to/imagenet
  python scripts/verify_resume.py --steps 20 --ranks 8 -- model=poolformer_s12 data.root=/path/to/imagenet

  python scripts/verify_resume.py --steps 300 --failures 100 --mean-seconds 10 -- model=poolformer_s12 data=sample

Trains the given configuration twice for --steps steps in separate folders: once undisturbed, and once killed with
SIGKILL midway and restarted with the same command. Prints the SHA-256 of each run's weights, averaged weights,
optimizer state, progress and metrics. Exit code: 0 if the runs are bit-identical, 1 if not. Nothing is sent to wandb.

With --failures, random processes of the run (launcher, rank, loader worker or helper) are killed with SIGKILL at random
times during its start, training and end. Each completed run is compared, and new runs are started until that many
failures have occurred. Prints what the failures cost.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from metaformer.errors import UserError
from metaformer.program import run_program
from metaformer.training.pointers import follow, read_pointer

TRAIN = Path(__file__).parents[1] / "train.py"
START_VARIABLE = "METAFORMER_FAILURES"  # environment variable that identifies the processes of a start
# Kinds of processes by a substring of the command; the first match counts.
PROCESS_KINDS = {
    "torch.distributed.run": "launcher",
    "multiprocessing.forkserver": "loader's server or worker",
    "multiprocessing.resource_tracker": "resource tracker",
    "backstop.py": "backstop",
    "train.py": "rank",
}
VARYING_FIELDS = ("images_per_second", "data_wait", "memory_gib")  # fields of metrics that differ between runs


def main() -> None:
    """Train without and with kills, and compare the results."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=arguments.folder) as temporary:
        undisturbed_dir, killed_dir = Path(temporary) / "whole", Path(temporary) / "killed"
        _train(arguments, undisturbed_dir)
        if arguments.failures:
            sys.exit(0 if inject_failures(arguments, undisturbed_dir) else 1)
        _train_and_kill(arguments, killed_dir)
        _train(arguments, killed_dir)
        undisturbed, resumed = hash_run(undisturbed_dir), hash_run(killed_dir)
    hashes = {name: (undisturbed[name], resumed[name]) for name in undisturbed}
    table = Table("part", "undisturbed", "killed and resumed", "")
    for name, (expected, found) in hashes.items():
        table.add_row(name, expected[:16], found[:16], "equal" if expected == found else "DIFFERENT")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if any(expected != found for expected, found in hashes.values()):
        sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run, at least 4 (20)")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes on this machine (1)")
    parser.add_argument("--folder", type=Path, help="folder for the temporary run folders; default: /tmp")
    parser.add_argument("--failures", type=int, default=0, metavar="N", help="kill a random process N times")
    parser.add_argument("--mean-seconds", type=float, default=10.0, metavar="S", help="mean time between failures (10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and processes (0)")
    parser.add_argument("overrides", nargs="+", help="overrides of train.py, after --")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        raise UserError(f"--steps {arguments.steps}: must be at least 4, so that a run can be killed midway")
    if arguments.ranks < 1:
        raise UserError(f"--ranks {arguments.ranks}: must be at least 1")
    if arguments.failures < 0 or arguments.mean_seconds <= 0:
        raise UserError("--failures must not be negative, and --mean-seconds must be greater than 0")
    for name in ("run_dir", "max_steps", "resume"):
        if any(override.lstrip("+").startswith(f"{name}=") for override in arguments.overrides):
            raise UserError(f"{name}=: set by this program; remove it")
    return arguments


def _command(arguments: argparse.Namespace, run_dir: Path) -> list[str]:
    launcher = [sys.executable]
    if arguments.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
    fixed = ["tracking=local", f"run_dir={run_dir}", f"max_steps={arguments.steps}"]
    fixed += [
        "log_every_steps=1",
        f"checkpoint.every_steps={max(1, arguments.steps // (40 if arguments.failures else 4))}",
    ]
    fixed += ["guards.max_starts_without_progress=1000000"] if arguments.failures else []
    return [*launcher, str(TRAIN), *arguments.overrides, *fixed]


def _train(arguments: argparse.Namespace, run_dir: Path) -> None:
    print(f"training {arguments.steps} steps in {run_dir}", file=sys.stderr, flush=True)
    done = subprocess.run(_command(arguments, run_dir), capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(f"train.py: {(errors or [done.stderr[-500:]])[0].removeprefix('error: ')}")


def _train_and_kill(arguments: argparse.Namespace, run_dir: Path) -> None:
    """Start a run, and kill all its processes when two thirds of its steps are logged."""
    print(f"training in {run_dir} until killed", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        _command(arguments, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2 * arguments.steps // 3:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed; the run resumes from {_last_checkpoint(run_dir)}", file=sys.stderr, flush=True)
            return
        time.sleep(0.01)
    raise UserError(f"--steps {arguments.steps}: the run ended before it could be killed; use more steps")


def _last_checkpoint(run_dir: Path) -> str:
    last = read_pointer(run_dir / "checkpoints" / "last")
    return "no checkpoint" if last is None else last.name


@dataclass
class FailureStats:
    """Counts of failures and their costs.

    Attributes:
        kills: The number of kills of each kind of process.
        ended: The number of failures that stopped the run.
        lost_steps: For each of those, the number of steps that were taken but not saved.
        recovery_seconds: Seconds until the next step in the log, for failures that were followed by one.
        repeated: The number of failures that were followed by another one before the next step.
    """

    kills: dict[str, int] = field(default_factory=dict)
    ended: int = 0
    lost_steps: list[int] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)
    repeated: int = 0

    @property
    def count(self) -> int:
        """Return the number of all failures."""
        return sum(self.kills.values())


def inject_failures(arguments: argparse.Namespace, undisturbed_dir: Path) -> bool:
    """Train with random kills until there have been enough; return whether every run ended like the undisturbed one."""
    expected, rng, failures = hash_run(undisturbed_dir), random.Random(arguments.seed), FailureStats()
    runs = differing = 0
    while failures.count < arguments.failures:
        run_dir = undisturbed_dir.with_name(f"killed-{runs}")
        _train_with_failures(arguments, run_dir, rng, failures)
        found = hash_run(run_dir)
        parts = [name for name in expected if found[name] != expected[name]]
        status = json.loads((run_dir / "status.json").read_text())
        verdict = f"DIFFERENT: {', '.join(parts)}" if parts else "equal bit for bit"
        print(f"run {runs + 1}: {verdict}; goodput {status['goodput']:.1f} %, starts: {status['starts']}, "
              f"{failures.count} failures so far", flush=True)  # fmt: skip
        runs, differing = runs + 1, differing + bool(parts)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(failures.kills.items()))
    print(f"{failures.count} failures ({kinds}); {failures.ended} stopped the run")
    print(f"{runs} runs, of which {differing} differ from the undisturbed one")
    if failures.recovery_seconds:
        lost, seconds = failures.lost_steps, failures.recovery_seconds
        print(f"lost steps: median {statistics.median(lost):g}, maximum {max(lost)}")
        print(f"recovery (failure to next step): median {statistics.median(seconds):.1f} s, "
              f"maximum {max(seconds):.1f} s; {failures.repeated} failed again before it")  # fmt: skip
    return differing == 0


def _train_with_failures(
    arguments: argparse.Namespace, run_dir: Path, rng: random.Random, failures: FailureStats
) -> None:
    """Restart a run with random kills until it is complete."""
    metrics, log = run_dir / "metrics.jsonl", run_dir.with_suffix(".log")
    failed_at: float | None = None  # time of the failure that stopped the run, until the next step is logged
    for start in itertools.count():
        first_step, variable = _last_step(metrics), f"{START_VARIABLE}={os.getpid()}-{run_dir.name}-{start}"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["env", variable, *_command(arguments, run_dir)], stdout=output, stderr=output, start_new_session=True
            )
        next_kill = time.monotonic() + rng.expovariate(1 / arguments.mean_seconds)
        killed_at, last_step = 0.0, first_step
        while process.poll() is None:
            now = time.monotonic()
            if failed_at is not None and _last_step(metrics) != first_step:
                failures.recovery_seconds.append(now - failed_at)
                failed_at = None
            if now >= next_kill and failures.count < arguments.failures:
                last_step = _last_step(metrics)
                if _kill_one(variable, rng, failures):
                    killed_at = now
                next_kill = now + rng.expovariate(1 / arguments.mean_seconds)
            time.sleep(0.02)
        while _processes(variable):  # ranks whose launcher was killed save and exit
            time.sleep(0.02)
        if process.returncode == 0:
            return
        if not killed_at:
            raise UserError(f"train.py: ended with exit code {process.returncode} without being killed; see {log}")
        failures.ended += 1
        failures.lost_steps.append(max(0, last_step - _saved_step(run_dir)))
        failures.repeated += failed_at is not None
        failed_at = killed_at


def _last_step(metrics: Path) -> int:
    """Return the last step in metrics.jsonl, or 0."""
    try:
        lines = metrics.read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith(b"}")), default=0)


def _saved_step(run_dir: Path) -> int:
    last = follow(run_dir / "checkpoints" / "last")
    if not last.exists():
        return 0
    step: int = torch.load(last / "trainer.pt", weights_only=True)["progress"]["step"]
    return step


def _kill_one(variable: str, rng: random.Random, failures: FailureStats) -> bool:
    processes = _processes(variable)
    if not processes:
        return False
    kind = rng.choice(sorted(set(processes.values())))  # choosing a process directly would mostly kill workers
    pid = rng.choice([pid for pid, other in processes.items() if other == kind])
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    failures.kills[kind] = failures.kills.get(kind, 0) + 1
    return True


def _processes(variable: str) -> dict[int, str]:
    """Return the kind of each live process, by ID, that has inherited this environment variable, NAME=VALUE."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            environment = (folder / "environ").read_bytes().split(b"\0")
            if state != "Z" and variable.encode() in environment:
                found[int(folder.name)] = _process_kind((folder / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has ended, or belongs to another user
    return found


def _process_kind(command: str) -> str:
    for part, kind in PROCESS_KINDS.items():
        if part in command:
            return kind
    return "other"


def hash_run(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each part of a run's result, computed from values, because files may contain times."""
    last = follow(run_dir / "checkpoints" / "last")
    hashes = {file.stem: _hash(load_file(file)) for file in sorted(last.glob("*.safetensors"))}
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    hashes |= {name: _hash(trainer[name]) for name in ("optimizer", "scaler", "progress", "loss_sum", "skips")}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    hashes["metrics"] = _hash([{k: v for k, v in row.items() if k not in VARYING_FIELDS} for row in rows])
    return hashes


def _hash(value: Any) -> str:
    digest = hashlib.sha256()

    def update(item: Any) -> None:
        if isinstance(item, Tensor):
            digest.update(f"{item.dtype} {list(item.shape)}".encode())
            digest.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key, value in item.items():
                digest.update(repr(key).encode())
                update(value)
        elif isinstance(item, list):
            digest.update(str(len(item)).encode())
            for element in item:
                update(element)
        else:
            digest.update(repr(item).encode())

    update(value)
    return digest.hexdigest()


if __name__ == "__main__":
    run_program(main)
