"""The commands that reproduce a row of the paper."""

import sys
from collections.abc import Sequence
from pathlib import Path

from metaformer.errors import UserError
from metaformer.reporting.paper import PAPER_IMAGE_SIZE, Row, Table


def train_command(row: Row, run_dir: Path, processes: int) -> list[str]:
    """Train a row's recipe on this machine."""
    return [*_python(processes), "train.py", *_recipe(row, run_dir)]


def submit_command(rows: Sequence[Row], runs: Path, at_once: int, sbatch_options: Sequence[str]) -> list[str]:
    """Train the recipes of rows as one SLURM job array, `at_once` of them at a time; overrides may follow."""
    array = f"--array=0-{len(rows) - 1}%{at_once}"
    return [
        "sbatch", array, *sbatch_options, "slurm/reproduce_table.sbatch", f"--runs={runs}",
        *(row.name for row in rows), "--",
    ]  # fmt: skip


def validate_command(row: Row, results_csv: Path, processes: int) -> list[str]:
    """Evaluate a row's released weights on this machine.

    Raises:
        UserError: there are none.
    """
    if row.released is None or row.model is None:
        raise UserError(f"row={row.name}: there are no released weights to evaluate; see --list")
    theirs = ["model=timm", f"model.name={row.model}", f"image_size={PAPER_IMAGE_SIZE}"]
    network = theirs if row.table is Table.comparison else [f"model={row.model}"]
    arguments = [*network, f"checkpoint={row.released}", f"results_csv={results_csv}"]
    return [*_python(processes), "validate.py", *arguments]


def _python(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def _recipe(row: Row, run_dir: Path) -> list[str]:
    return [f"experiment={row.name}", f"run_dir={run_dir}"]
