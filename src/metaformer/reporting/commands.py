"""The commands that reproduce a row of the paper."""

import sys
from collections.abc import Sequence
from pathlib import Path

import timm

from metaformer.errors import UserError
from metaformer.reporting.paper import Row, Table


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
    network = _timm_network(row.released) if row.table is Table.comparison else [f"model={row.model}"]
    arguments = [*network, f"checkpoint={row.released}", f"results_csv={results_csv}"]
    return [*_python(processes), "validate.py", *arguments]


def _python(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def _recipe(row: Row, run_dir: Path) -> list[str]:
    return [f"experiment={row.name}", f"run_dir={run_dir}"]


def timm_crop(weights: str) -> float:
    """The crop fraction that weights of timm expect, `hf:timm/NAME`."""
    return float(timm.get_pretrained_cfg(weights.removeprefix("hf:timm/")).crop_pct)


def _timm_network(weights: str) -> list[str]:
    """A network of timm with the pre-processing that its weights expect."""
    name = weights.removeprefix("hf:timm/")
    wants = timm.get_pretrained_cfg(name)
    mean, std = (f"[{','.join(map(str, values))}]" for values in (wants.mean, wants.std))
    return [
        "model=timm",
        f"model.name={name.split('.')[0]}",
        f"model.crop_pct={wants.crop_pct}",
        f"model.mean={mean}",
        f"model.std={std}",
    ]
