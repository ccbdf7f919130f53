"""Prove on this machine that a run which is killed and goes on ends as one that nothing happened to.

  python scripts/verify_resume.py --steps 20 -- model=poolformer_s12 data.root=/path/to/imagenet
  python scripts/verify_resume.py --steps 20 --ranks 8 -- model=poolformer_s12 data.root=/path/to/imagenet

  python scripts/verify_resume.py --steps 300 --failures 100 --mean-seconds 10 -- model=poolformer_s12 data=sample

Trains the given configuration twice for so many steps, in folders of their own: once undisturbed, once killed by
SIGKILL in the middle and started again by the same command. Prints the SHA-256 of what each leaves: weights, average,
optimizer and progress, rows of metrics. Exit code 0: equal bit for bit; 1: not. Nothing goes to wandb.

With --failures, SIGKILL goes to one process of the run after another, chosen at random (launcher, rank, worker, what
serves a rank), at random moments of its start, its training and its end. A run that completes is compared, and the
next one begins, until there were so many failures. Prints what they cost.
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
MARK = "METAFORMER_FAILURES"  # an environment variable, by which the processes of a start are found
# What a process is, by a part of its command; the first that fits.
KINDS = {
    "torch.distributed.run": "launcher",
    "multiprocessing.forkserver": "loader's server or worker",
    "multiprocessing.resource_tracker": "resource tracker",
    "backstop.py": "backstop",
    "train.py": "rank",
}
OF_THE_CLOCK = ("images_per_second", "data_wait", "memory_gib")  # figures of a row that differ from run to run


def main() -> None:
    """Train twice, compare."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=arguments.folder) as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        _train(arguments, whole)
        if arguments.failures:
            sys.exit(0 if inject_failures(arguments, whole) else 1)
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
    parser.add_argument("--failures", type=int, default=0, metavar="N", help="kill processes at random N times")
    parser.add_argument(
        "--mean-seconds", type=float, default=10.0, metavar="S", help="between two failures, on average"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and processes")
    parser.add_argument("overrides", nargs="+", help="train.py's, after --")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        raise UserError(f"--steps {arguments.steps}: must be at least 4, to be killed in the middle")
    if arguments.ranks < 1:
        raise UserError(f"--ranks {arguments.ranks}: must be at least 1")
    if arguments.failures < 0 or arguments.mean_seconds <= 0:
        raise UserError("--failures: must not be negative, and --mean-seconds must be above 0")
    for name in ("run_dir", "max_steps", "resume"):
        if any(override.lstrip("+").startswith(f"{name}=") for override in arguments.overrides):
            raise UserError(f"{name}=: set by this program; leave it out")
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


@dataclass
class Failures:
    """What the failures so far have cost.

    Attributes:
        killed: kinds of processes, with how often each was killed.
        ended: how many of the failures ended the run's processes.
        lost_steps: of each of those, the steps that were taken but not saved.
        recovery: seconds from each of those to the next step in the log.
    """

    killed: dict[str, int] = field(default_factory=dict)
    ended: int = 0
    lost_steps: list[int] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Of all failures."""
        return sum(self.killed.values())


def inject_failures(arguments: argparse.Namespace, whole: Path) -> bool:
    """Kill and start again until there were enough failures; whether every run ended as the undisturbed one."""
    expected, rng, failures = hash_run(whole), random.Random(arguments.seed), Failures()
    runs = differing = 0
    while failures.count < arguments.failures:
        run_dir = whole.with_name(f"killed-{runs}")
        _train_with_failures(arguments, run_dir, rng, failures)
        found = hash_run(run_dir)
        parts = [name for name in expected if found[name] != expected[name]]
        status = json.loads((run_dir / "status.json").read_text())
        said = f"DIFFERENT: {', '.join(parts)}" if parts else "equal bit for bit"
        print(f"run {runs + 1}: {said}; goodput {status['goodput']:.1f} %, starts: {status['starts']}, "
              f"{failures.count} failures so far", flush=True)  # fmt: skip
        runs, differing = runs + 1, differing + bool(parts)
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(failures.killed.items()))
    print(f"{failures.count} failures ({kinds}); {failures.ended} ended the run's processes")
    print(f"{runs} runs, {differing} of them different from the undisturbed one")
    if failures.recovery:
        lost, seconds = failures.lost_steps, failures.recovery
        print(f"lost steps: median {statistics.median(lost):g}, most {max(lost)}")
        print(f"recovery, from the failure to the next step: median {statistics.median(seconds):.1f} s, "
              f"longest {max(seconds):.1f} s")  # fmt: skip
    return differing == 0


def _train_with_failures(arguments: argparse.Namespace, run_dir: Path, rng: random.Random, failures: Failures) -> None:
    """Start a run again and again until it is complete."""
    metrics, log = run_dir / "metrics.jsonl", run_dir.with_suffix(".log")
    failed_at: float | None = None  # what ended the processes, until the next step
    for start in itertools.count():
        steps, mark = _steps(metrics), f"{MARK}={os.getpid()}-{run_dir.name}-{start}"
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["env", mark, *_command(arguments, run_dir)], stdout=output, stderr=output, start_new_session=True
            )
        strike = time.monotonic() + rng.expovariate(1 / arguments.mean_seconds)
        struck_at, seen = 0.0, steps
        while process.poll() is None:
            now = time.monotonic()
            if failed_at is not None and _steps(metrics) != steps:
                failures.recovery.append(now - failed_at)
                failed_at = None
            if now >= strike and failures.count < arguments.failures:
                seen = _steps(metrics)
                if _kill_one(mark, rng, failures):
                    struck_at = now
                strike = now + rng.expovariate(1 / arguments.mean_seconds)
            time.sleep(0.02)
        while _processes(mark):  # ranks whose launcher was killed save, and end
            time.sleep(0.02)
        if process.returncode == 0:
            return
        if not struck_at:
            raise UserError(f"train.py: ended with exit code {process.returncode} without a failure; see {log}")
        failures.ended += 1
        failures.lost_steps.append(max(0, seen - _saved_step(run_dir)))
        failed_at = failed_at or struck_at


def _steps(metrics: Path) -> int:
    """The last step in the log."""
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


def _kill_one(mark: str, rng: random.Random, failures: Failures) -> bool:
    processes = _processes(mark)
    if not processes:
        return False
    kind = rng.choice(sorted(set(processes.values())))  # else most would be workers
    pid = rng.choice([pid for pid, other in processes.items() if other == kind])
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    failures.killed[kind] = failures.killed.get(kind, 0) + 1
    return True


def _processes(mark: str) -> dict[int, str]:
    """Living processes of one start, in whatever session, and what each is: all have inherited the mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            environment = (folder / "environ").read_bytes().split(b"\0")
            if state != "Z" and mark.encode() in environment:
                found[int(folder.name)] = _kind((folder / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def _kind(command: str) -> str:
    for part, kind in KINDS.items():
        if part in command:
            return kind
    return "other"


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
