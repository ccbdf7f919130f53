"""Submit trainings to SLURM, each with its configuration as it is composed now.

  python scripts/submit.py --nodes 2 --gpus-per-node 8 --time 1-0 model=poolformer_m36 data.root=/path/to/imagenet
  python scripts/submit.py --gpus-per-node 8 --dry-run model=poolformer_s12 optimizer.lr=1e-3,2e-3 seed=0,1

Overrides are train.py's; commas make a job for each combination, with a run folder of its own. A configuration that
cannot work is refused before anything is submitted. The composed files lie in runs/.slurm, and the jobs read those:
later edits of conf/ do not reach them (later edits of the code do). The jobs do what slurm/train.sbatch does.
"""

import argparse
import hashlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from metaformer.config import TrainConfig, compose_training, freeze
from metaformer.errors import UserError
from metaformer.files import write_text_atomically
from metaformer.program import run_program

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "slurm" / "train.sbatch"


class Training(NamedTuple):
    """One job's configuration."""

    config: TrainConfig
    changes: list[str]  # the values of this job where the command line has several

    @property
    def name(self) -> str:
        """Of the frozen file: differs where the content does."""
        digest = hashlib.sha256(freeze(self.config).encode()).hexdigest()
        return f"{re.sub('[^a-zA-Z0-9_]+', '-', self.config.resolved_run_dir.name)}-{digest[:12]}"


def main() -> None:
    """Compose all, freeze all, submit all."""
    arguments = _parse()
    trainings = expand(arguments.overrides)
    for training in trainings:
        training.config.check_batches(arguments.nodes * (arguments.gpus_per_node or 1))
    folder = REPOSITORY / "runs" / ".slurm"
    options = _sbatch_options(arguments)
    for training in trainings:
        changes = f" ({', '.join(training.changes)})" if training.changes else ""
        print(f"{training.config.run_dir}{changes}: {folder / training.name}.yaml")
    if arguments.dry_run:
        print(
            f"nothing submitted; sbatch options: {shlex.join(f'--{name}={value}' for name, value in options.items())}"
        )
        return
    submit = _submitter(folder, options)
    for training in trainings:
        write_text_atomically(folder / f"{training.name}.yaml", freeze(training.config))
        number = submit([f"--config-dir={folder}", f"--config-name={training.name}"])
        print(f"job {number}: {training.config.run_dir}; log: {folder / f'{number}_0_log.out'}", flush=True)


def expand(overrides: Sequence[str]) -> list[Training]:
    """A configuration for each combination of values; run folders that would be the same get the values in their name.

    Raises:
        UserError: one of them cannot work, or two would still train in the same folder.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"overrides: cannot be parsed ({str(error).splitlines()[0]})") from error
    choices = [_values(override) for override in parsed]
    swept = [override.is_sweep_override() for override in parsed]
    trainings = [
        Training(compose_training(point), [value for value, varies in zip(point, swept, strict=True) if varies])
        for point in itertools.product(*choices)
    ]
    if _share_folders(trainings):
        for training in trainings:
            training.config.run_dir = f"{training.config.run_dir}-{','.join(training.changes).replace('/', '-')}"
    if _share_folders(trainings):
        raise UserError("overrides: two jobs would train in the same run folder; give each value once")
    return trainings


def _values(override: Override) -> list[str]:
    """The override once for each of its values, as the command line has it where that is one."""
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _share_folders(trainings: list[Training]) -> bool:
    return len({training.config.run_dir for training in trainings}) < len(trainings)


def _sbatch_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of the script, then the user's."""
    written = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    options: dict[str, Any] = {name: value or True for name, value in written}
    given = ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition")
    options |= {
        name.replace("_", "-"): getattr(arguments, name) for name in given if getattr(arguments, name) is not None
    }
    return options | dict(arguments.sbatch)


def _submitter(folder: Path, options: dict[str, Any]) -> Any:
    """A function that submits slurm/train.sbatch with these arguments and returns the job's number."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitit is not installed; `uv pip install submitit`") from error
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # exec: SLURM's warning before the time limit goes to the batch step's first process, which must be the script.
        executor = submitit.SlurmExecutor(folder=folder, python=f"exec {shlex.quote(sys.executable)}")
    except RuntimeError as error:
        raise UserError("no SLURM on the path; run this on a login node of the cluster, or add --dry-run") from error
    executor.update_parameters(
        job_name="metaformer", stderr_to_stdout=True, use_srun=False,
        additional_parameters={**options, "chdir": str(REPOSITORY)},
    )  # fmt: skip

    def submit(arguments: list[str]) -> str:
        try:
            return str(executor.submit(run_batch_script, str(SCRIPT), arguments).job_id)
        except submitit.core.utils.FailedJobError as error:
            found = re.findall(r"sbatch: error: (.*)", str(error)) or [str(error)]
            raise UserError(f"sbatch refused the job: {'; '.join(found)}") from error

    return submit


def run_batch_script(script: str, arguments: list[str]) -> None:
    """What the job does: become the batch script, which handles signals and requeues."""
    os.execvp("bash", ["bash", script, *arguments])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="train.py's; a=1,2 makes two jobs")
    parser.add_argument("--nodes", type=int, default=1, help="of each job (1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="each gets a process")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of a node")
    parser.add_argument("--time", metavar="LIMIT", help="as sbatch takes it: minutes, or days-hours, ...")
    parser.add_argument("--partition")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch"
    )
    parser.add_argument("--dry-run", action="store_true", help="compose and check, submit nothing")
    arguments = parser.parse_intermixed_args()
    if arguments.nodes < 1 or (arguments.gpus_per_node or 1) < 1:
        parser.error("--nodes and --gpus-per-node must be at least 1")
    if not all(re.fullmatch("[a-z-]+=.+", option) for option in arguments.sbatch):
        parser.error("--sbatch: give NAME=VALUE, as in --sbatch account=vision")
    arguments.sbatch = [tuple(option.split("=", 1)) for option in arguments.sbatch]
    return arguments


if __name__ == "__main__":
    run_program(main)
