"""Reproduce the papers' tables: list their rows, run rows here or on SLURM, and report the results.

  python scripts/reproduce_table.py --list
  python scripts/reproduce_table.py --run paper/poolformer_s12 -- data.root=/path/to/imagenet
  python scripts/reproduce_table.py --released --run 'paper/*' 'comparison/*' -- data.root=/path/to/imagenet
  python scripts/reproduce_table.py --submit 'ablation/*' --sbatch '--nodes=1 --gpus-per-node=8' -- data.root=...
  python scripts/reproduce_table.py --recipe paper/poolformer_s12 > conf/experiment/mine.yaml
  python scripts/reproduce_table.py --report

A row is trained by `train.py experiment=ROW`. With --released, its published weights are evaluated instead. Arguments
after -- are passed to train.py or validate.py. Running the same command again resumes. --submit creates one job array
with a task for each row and runs --at-once tasks at a time; each task that finishes updates the table.
"""

import argparse
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from metaformer.assembly import resolve_config
from metaformer.composing import compose_recipe, default_run_dir
from metaformer.errors import UserError
from metaformer.files import write_atomically, write_text_atomically
from metaformer.models.config import Library, ModelConfig
from metaformer.models.preprocessing import resolve_preprocessing
from metaformer.program import run_program
from metaformer.reporting.commands import submit_command, train_command, validate_command
from metaformer.reporting.outcomes import Outcome, read_released, read_run
from metaformer.reporting.paper import ROWS, Row, find_rows
from metaformer.reporting.recipes import recipe_file
from metaformer.reporting.table import Comparison, to_csv, to_markdown

REPOSITORY = Path(__file__).parents[1]


class RowFailed(UserError):
    """A row's program failed and has printed its own error."""

    def __init__(self, row: Row, exit_code: int) -> None:
        super().__init__(f"row={row.name}: its program ended with exit code {exit_code}; later rows were not started")
        self.exit_code = exit_code


def main() -> None:
    """Parse the command line and run the requested action."""
    arguments = _parse()
    runs: Path = arguments.runs.absolute()
    if arguments.list:
        _list()
    elif arguments.report:
        _report(runs)
    elif arguments.recipe:
        for row in _require_recipes(find_rows([arguments.recipe])):
            print(recipe_file(row), end="")
    elif arguments.run_dir:
        for row in find_rows([arguments.run_dir]):
            print(_run_dir(row, runs))
    elif arguments.submit:
        _submit(find_rows(arguments.submit), runs, arguments)
    else:
        _run([(row, _command(row, runs, arguments) + arguments.overrides) for row in find_rows(arguments.run)])


def _run(commands: list[tuple[Row, list[str]]]) -> None:
    for row, command in commands:
        print(f"{row.name}: {shlex.join(command)}", flush=True)
        try:
            done = subprocess.run(command, cwd=REPOSITORY, check=False)
        except OSError as error:
            raise UserError(f"row={row.name}: cannot start {command[0]} ({error.strerror})") from error
        if done.returncode:
            raise RowFailed(row, done.returncode)


def _submit(rows: list[Row], runs: Path, arguments: argparse.Namespace) -> None:
    for row in rows:
        _run_dir(row, runs)  # raises an error for rows without a recipe
    command = submit_command(rows, runs, arguments.at_once, arguments.sbatch) + arguments.overrides
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            "--submit: sbatch is not on the PATH; run this on a login node of a SLURM cluster, or use --run"
        ) from error
    if done.returncode:
        raise UserError(f"--submit: {' '.join(done.stderr.split())}")
    print(done.stdout.strip())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="list the rows")
    action.add_argument("--run", nargs="+", metavar="ROW", help="run rows here, in order; may contain wildcards")
    action.add_argument("--submit", nargs="+", metavar="ROW", help="submit rows to SLURM as a job array")
    action.add_argument("--recipe", metavar="ROW", help="print a row's recipe, to copy to conf/experiment/ and change")
    action.add_argument("--run-dir", metavar="ROW", help="print a row's run folder")
    action.add_argument("--report", action="store_true", help="write table.md, table.csv and table.png to --runs")
    parser.add_argument("--released", action="store_true", help="evaluate released weights instead of training")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders and results (runs)")
    gpus = torch.cuda.device_count()
    parser.add_argument("--processes", type=int, default=max(1, gpus), help="processes for --run; default: one per GPU")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="rows that --submit runs at a time (4)")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help="options for sbatch, as one quoted string")
    options, overrides = sys.argv[1:], []
    if "--" in options:
        separator = options.index("--")
        options, overrides = options[:separator], options[separator + 1 :]
    arguments = parser.parse_args(options)
    arguments.overrides = overrides
    if arguments.released and not arguments.run:
        parser.error("--released: requires --run; an evaluation takes only minutes")
    if overrides and not (arguments.run or arguments.submit):
        parser.error("overrides after -- require --run or --submit")
    for option in ("processes", "at_once"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(arguments, option)}: must be at least 1")
    try:
        arguments.sbatch = shlex.split(arguments.sbatch)
    except ValueError as error:
        parser.error(f"--sbatch {arguments.sbatch}: {error}")
    return arguments


def _command(row: Row, runs: Path, arguments: argparse.Namespace) -> list[str]:
    if arguments.released:
        return validate_command(row, runs / "results.csv", arguments.processes)
    return train_command(row, _run_dir(row, runs), arguments.processes)


def _run_dir(row: Row, runs: Path) -> Path:
    """Return a row's run folder: the one that train.py would choose, but in --runs."""
    _require_recipes([row])
    assert row.model is not None, row.name
    return Path(default_run_dir(row.model, row.name, runs))


def _require_recipes(rows: list[Row]) -> list[Row]:
    """Return the rows; raise `UserError` if one has no recipe."""
    for row in rows:
        if not row.has_recipe:
            raise UserError(f"row={row.name}: has no recipe here; evaluate its released weights with --released --run")
    return rows


def _list() -> None:
    print("row, top-1 in the paper, released weights")
    for _, rows in groupby(ROWS, key=lambda row: row.name.partition("/")[0]):
        group = list(rows)
        longest = max(len(row.name) for row in group)
        for row in group:
            weights = row.released_weights or ("none in timm" if row.is_comparison else "none")
            print(f"{row.name:<{longest}} {row.top1:.1f} {weights}")
    print(
        "Comparison rows and those from ImageNet-21K have no recipe;\nevaluate their released weights: --released --run"
    )


def _report(runs: Path) -> None:
    try:
        from metaformer.reporting.plot import save_plot
    except ImportError as error:
        raise UserError("--report: matplotlib is not installed; `uv pip install matplotlib`") from error
    comparisons = [_compare(row, runs) for row in ROWS]
    try:
        runs.mkdir(parents=True, exist_ok=True)
        write_text_atomically(runs / "table.md", to_markdown(comparisons))
        write_text_atomically(runs / "table.csv", to_csv(comparisons))
        write_atomically(runs / "table.png", lambda file: save_plot(comparisons, file))
    except OSError as error:
        raise UserError(f"--runs {runs}: cannot be written ({error.strerror or error})") from error
    trained = sum(comparison.ours.top1 is not None for comparison in comparisons)
    evaluated = sum(comparison.released.top1 is not None for comparison in comparisons)
    print(f"{runs / 'table.md'}, table.csv, table.png: {len(ROWS)} rows, {trained} trained here, {evaluated} evaluated")


def _compare(row: Row, runs: Path) -> Comparison:
    results = runs / "results.csv"
    if not row.has_recipe:
        return Comparison(row, Outcome(note="no recipe here"), _released(row, results))
    folder = _run_dir(row, runs)
    ours = read_run(folder, _settings(row)) if folder.is_dir() else Outcome()
    return Comparison(row, ours, _released(row, results))


def _settings(row: Row) -> Any:
    """Return a row's configuration as nested plain values. Composing it takes a fifth of a second."""
    recipe, _ = resolve_config(compose_recipe(row.name), weights=None)
    return OmegaConf.to_container(OmegaConf.structured(recipe), enum_to_str=True)


def _released(row: Row, results: Path) -> Outcome:
    """Return the result of a row's released weights, with a note if their expected preprocessing was not used."""
    if row.model is None:
        return read_released(row, results, 0, "")
    library = Library.timm if row.is_comparison else Library.metaformer
    expected = resolve_preprocessing(
        ModelConfig(row.model, library), row.image_size, row.released_weights, evaluation=True
    )
    return read_released(row, results, expected.crop_pct, expected.interpolation.value)


if __name__ == "__main__":
    run_program(main)
