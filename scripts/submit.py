"""Submit trainings to SLURM, or run them here one after the other, each with its configuration frozen at submission.

  python scripts/submit.py --nodes 2 --gpus-per-node 8 --time 1-0 model=poolformer_m36 data.root=/path/to/imagenet
  python scripts/submit.py --gpus-per-node 8 --dry-run model=poolformer_s12 optimizer.lr=1e-3,2e-3 seed=0,1
  python scripts/submit.py --local --keep-going model=poolformer_s12 optimizer.lr=1e-3,2e-3 data.root=images

Overrides are those of train.py. Comma-separated values create a job for each combination, with its own run folder. All
configurations are validated before anything is submitted. Jobs run slurm/train.sbatch and read their configuration from
runs/.slurm, so later edits of conf/ do not affect them; later edits of the code do. --local runs the trainings on this
machine, one after the other; the same command again resumes, and skips trainings that are complete.
"""

import argparse
import hashlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from metaformer.composing import compose_training, freeze
from metaformer.config import TrainConfig
from metaformer.errors import UserError
from metaformer.files import write_text_atomically
from metaformer.program import run_program
from metaformer.tracking.jsonl import ROW_TYPES
from metaformer.tracking.line_file import read_objects

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "slurm" / "train.sbatch"


class Job(NamedTuple):
    """A training to submit."""

    config: TrainConfig
    swept_values: list[str]  # this job's choice for each override with several values

    @property
    def name(self) -> str:
        """Return a name for the frozen file that depends on its content."""
        digest = hashlib.sha256(freeze(self.config).encode()).hexdigest()
        return f"{re.sub('[^a-zA-Z0-9_]+', '-', self.config.resolved_run_dir.name)}-{digest[:12]}"


def main() -> None:
    """Compose and check all configurations, then freeze and submit each."""
    arguments = _parse()
    jobs = expand_sweep(arguments.overrides)
    for job in jobs:
        job.config.check_batches(arguments.nodes * (arguments.gpus_per_node or 1))
    if arguments.local:
        return run_here(jobs, arguments.gpus_per_node or 1, arguments.keep_going)
    folder = REPOSITORY / "runs" / ".slurm"
    options = _sbatch_options(arguments)
    for job in jobs:
        values = f" ({', '.join(job.swept_values)})" if job.swept_values else ""
        print(f"{job.config.run_dir}{values}: {folder / job.name}.yaml")
    if arguments.dry_run:
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        print(f"nothing submitted; sbatch options: {shlex.join(given)}")
        return
    submit = _make_submit(folder, options)
    for job in jobs:
        write_text_atomically(folder / f"{job.name}.yaml", freeze(job.config))
        job_id = submit([f"--config-dir={folder}", f"--config-name={job.name}"])
        print(f"job {job_id}: {job.config.run_dir}; log: {folder / f'{job_id}_0_log.out'}", flush=True)


def run_here(jobs: Sequence[Job], processes: int, keep_going: bool) -> None:
    """Run the trainings on this machine, one after the other, and print a table of their results.

    Args:
        processes: Ranks of each training.
        keep_going: Start the other trainings after one has failed.
    """
    folder = Path("runs") / ".local"
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[str] = []
    for number, job in enumerate(jobs, start=1):
        write_text_atomically(folder / f"{job.name}.yaml", freeze(job.config))
        print(f"sweep        {number} of {len(jobs)}: {' '.join(job.swept_values)}, {job.config.run_dir}", flush=True)
        code = _train_here([f"--config-dir={folder.absolute()}", f"--config-name={job.name}"], processes)
        outcomes.append("done" if code == 0 else f"exit code {code}")
        if code and not keep_going:
            break
    outcomes += ["not started"] * (len(jobs) - len(outcomes))
    print("", *_table(jobs, outcomes), sep="\n", flush=True)
    failed = sum(outcome != "done" for outcome in outcomes)
    if failed:
        fix = (
            "the same command resumes" if keep_going else "the same command resumes; --keep-going passes over failures"
        )
        raise UserError(f"{failed} of {len(jobs)} trainings are not done; {fix}")


def _train_here(arguments: list[str], processes: int) -> int:
    """Run train.py, and return its exit code. Ctrl-C reaches it too."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with subprocess.Popen([*launcher, str(REPOSITORY / "train.py"), *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # it saves its state
            raise


def _table(jobs: Sequence[Job], outcomes: Sequence[str]) -> Iterator[str]:
    """Yield a line for each training: how it ended, the top-1 of its last validation, its values and its folder."""
    rows = [("", "top-1", "best", "values", "run folder")]
    for job, outcome in zip(jobs, outcomes, strict=True):
        last, best = _accuracies(job.config.resolved_run_dir)
        rows.append((outcome, last, best, " ".join(job.swept_values), str(job.config.run_dir)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _accuracies(run_dir: Path) -> tuple[str, str]:
    """Return the last and the best top-1 in a run's metrics, in percent; "-" where there is none."""
    try:
        rows = read_objects(run_dir / "metrics.jsonl", ROW_TYPES, allow_partial_last_line=True)
    except (OSError, UserError):  # a damaged file must not hide the other trainings
        rows = []
    found = [row["top1"] for row in rows if row.get("top1") is not None]
    return (f"{found[-1]:.2f}", f"{max(found):.2f}") if found else ("-", "-")


def expand_sweep(overrides: Sequence[str]) -> list[Job]:
    """Return a job for each combination of values; if run folders would coincide, add the values to their names."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"overrides: cannot be parsed ({str(error).splitlines()[0]})") from error
    choices = [_values(override) for override in parsed]
    swept = [override.is_sweep_override() for override in parsed]
    jobs = [
        Job(compose_training(point), [value for value, varies in zip(point, swept, strict=True) if varies])
        for point in itertools.product(*choices)
    ]
    if _share_folders(jobs):
        for job in jobs:
            job.config.run_dir = f"{job.config.run_dir}-{','.join(job.swept_values).replace('/', '-')}"
    if _share_folders(jobs):
        raise UserError("overrides: two jobs would train in the same run folder; give each value once")
    return jobs


def _values(override: Override) -> list[str]:
    """Return the override once per value, or unchanged if it has a single value."""
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _share_folders(jobs: list[Job]) -> bool:
    return len({job.config.run_dir for job in jobs}) < len(jobs)


def _sbatch_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options in the batch script, overridden by the user's."""
    script_options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    options: dict[str, Any] = {name: value or True for name, value in script_options}
    names = ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition")
    options |= {
        name.replace("_", "-"): getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    return options | dict(arguments.sbatch)


def _make_submit(folder: Path, options: dict[str, Any]) -> Any:
    """Return a function that submits slurm/train.sbatch with the given arguments and returns the job ID."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitit is not installed; `uv pip install submitit`") from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # exec, because SLURM sends its signal before the time limit to the batch step's first process only.
        executor = submitit.SlurmExecutor(folder=folder, python=f"exec {shlex.quote(sys.executable)}")
    except RuntimeError as error:
        raise UserError("SLURM is not on the PATH; run this on a login node, or add --dry-run") from error
    executor.update_parameters(
        job_name="metaformer", stderr_to_stdout=True, use_srun=False,
        additional_parameters={**options, "chdir": str(REPOSITORY)},
    )  # fmt: skip

    def submit(arguments: list[str]) -> str:
        try:
            return str(executor.submit(run_batch_script, str(SCRIPT), arguments).job_id)
        except submitit.core.utils.FailedJobError as error:
            reasons = re.findall(r"sbatch: error: (.*)", str(error)) or [str(error)]
            raise UserError(f"sbatch refused the job: {'; '.join(reasons)}") from error

    return submit


def run_batch_script(script: str, arguments: list[str]) -> None:
    """Replace this process by the batch script, which handles signals and requeues; this is what the job runs."""
    os.execvp("bash", ["bash", script, *arguments])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="override of train.py; a=1,2 makes two jobs")
    parser.add_argument("--local", action="store_true", help="run here, one training after the other, without SLURM")
    parser.add_argument("--keep-going", action="store_true", help="with --local, continue after a training that fails")
    parser.add_argument("--nodes", type=int, default=1, help="nodes per job (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs per node, with one process each")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores per node")
    parser.add_argument("--time", metavar="LIMIT", help="time limit as in sbatch: minutes, days-hours, ...")
    parser.add_argument("--partition")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch"
    )
    parser.add_argument("--dry-run", action="store_true", help="compose and check, but submit nothing")
    arguments = parser.parse_intermixed_args()
    if arguments.nodes < 1 or (arguments.gpus_per_node or 1) < 1:
        parser.error("--nodes and --gpus-per-node must be at least 1")
    if arguments.keep_going and not arguments.local:
        parser.error("--keep-going is for --local; jobs of SLURM do not wait for each other")
    if arguments.local and (arguments.nodes > 1 or arguments.dry_run or arguments.time or arguments.sbatch):
        parser.error("--local runs here; it takes --gpus-per-node and --keep-going only")
    if not all(re.fullmatch("[a-z-]+=.+", option) for option in arguments.sbatch):
        parser.error("--sbatch: give NAME=VALUE, as in --sbatch account=vision")
    arguments.sbatch = [tuple(option.split("=", 1)) for option in arguments.sbatch]
    return arguments


if __name__ == "__main__":
    run_program(main)
