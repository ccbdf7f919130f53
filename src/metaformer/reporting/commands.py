"""Commands that reproduce a row of the paper."""

import sys
from collections.abc import Sequence
from pathlib import Path

from metaformer.errors import UserError
from metaformer.reporting.paper import PAPER_IMAGE_SIZE, Row, Table


def train_command(row: Row, run_dir: Path, processes: int) -> list[str]:
    """Return the command that trains a row's recipe on this machine."""
    return [*_python(processes), "train.py", *_recipe(row, run_dir)]


def submit_command(rows: Sequence[Row], runs: Path, max_concurrent: int, sbatch_options: Sequence[str]) -> list[str]:
    """Return the command that trains rows as one SLURM job array; overrides may be appended."""
    array = f"--array=0-{len(rows) - 1}%{max_concurrent}"
    return [
        "sbatch", array, *sbatch_options, "slurm/reproduce_table.sbatch", f"--runs={runs}",
        *(row.name for row in rows), "--",
    ]  # fmt: skip


def validate_command(row: Row, results_csv: Path, processes: int) -> list[str]:
    """Return the command that evaluates a row's released weights on this machine."""
    if row.released_weights is None or row.model is None:
        raise UserError(f"row={row.name}: there are no released weights to evaluate; see --list")
    timm_network = ["model=timm", f"model.name={row.model}", f"image_size={PAPER_IMAGE_SIZE}"]
    network = timm_network if row.table is Table.comparison else [f"model={row.model}"]
    arguments = [*network, f"checkpoint={row.released_weights}", f"results_csv={results_csv}"]
    return [*_python(processes), "validate.py", *arguments]


def _python(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def _recipe(row: Row, run_dir: Path) -> list[str]:
    return [f"experiment={row.name}", f"run_dir={run_dir}"]
