"""Test reproduce_table.py from the command line, on small images."""

import csv
from pathlib import Path

import pytest

from metaformer.reporting.paper import ROWS
from tests.conftest import QUICK, VAL_IMAGES, Finished, launch


def reproduce(*arguments: str) -> Finished:
    return launch("scripts/reproduce_table", *arguments)


def table(runs: Path) -> dict[str, dict[str, str]]:
    with (runs / "table.csv").open(newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def test_list_names_every_row() -> None:
    """--list prints every row with its weights in 80 columns, and marks rows that timm does not have."""
    listed = reproduce("--list")
    assert listed.code == 0
    assert all(row.name in listed.stdout for row in ROWS)
    assert "none in timm" in listed.stdout
    assert max(map(len, listed.stdout.splitlines())) <= 80


def test_a_row_is_trained_and_reported(images: Path, tmp_path: Path) -> None:
    """A row trains with its recipe; the report has its result, its differences from the recipe, and no other result."""
    command = ("--run", "ablation/relu", "--runs", str(tmp_path), "--processes", "1", "--", f"data.root={images}")
    finished = reproduce(*command, *QUICK, "epochs=2", "workers=0")
    assert finished.code == 0
    top1 = finished.result["best_top1"]
    assert reproduce("--report", "--runs", str(tmp_path)).code == 0
    row = table(tmp_path)["ablation/relu"]
    assert row["top-1, ours"] == f"{top1:.2f}"
    assert row["difference"] == f"{top1 - 76.4:+.2f}"
    assert row["images"] == str(VAL_IMAGES)
    assert "epochs=2" in row["note"]
    assert f"{VAL_IMAGES} images, not 50,000" in row["note"]
    assert Path(row["run folder"]) == tmp_path / "metaformer_s12_relu-ablation"
    others = [other for name, other in table(tmp_path).items() if name != "ablation/relu"]
    assert not any(other["top-1, ours"][0].isdigit() for other in others)
    assert (tmp_path / "table.md").read_text().count("| ") > len(ROWS)
    assert (tmp_path / "table.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--run", "paper/poolformer_s13"), ("row=paper/poolformer_s13", "unknown", "paper/poolformer_s12")),
        (("--run", "comparison/deit_s"), ("row=comparison/deit_s", "no recipe", "--released")),
        (("--released", "--run", "comparison/pvt_tiny"), ("row=comparison/pvt_tiny", "no released weights")),
        (("--report", "--runs", __file__), ("--runs ", "cannot be written")),
    ],
)
def test_rows_that_cannot_be_run_are_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    """Unknown rows and rows without a recipe or weights give a one-line error and exit code 2; nothing is started."""
    refused = reproduce(*arguments)
    assert refused.code == 2
    (line,) = refused.errors
    assert all(word in line for word in words), line
    assert refused.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--report", "--", "epochs=1"),
        ("--released", "--submit", "paper/poolformer_s12"),
        ("--run", "paper/poolformer_s12", "--processes", "0"),
        ("--submit", "paper/poolformer_s12", "--sbatch", "'--nodes=1"),
        ("--submit", "paper/poolformer_s12", "--at-once", "0"),
    ],
)
def test_options_that_do_nothing_are_refused(arguments: tuple[str, ...]) -> None:
    """Options that would be ignored or cannot work give the usage and exit code 2."""
    refused = reproduce(*arguments)
    assert refused.code == 2
    assert "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("reproduce_table.py: error: ")


def test_a_failing_row_stops_the_rest(images: Path, tmp_path: Path) -> None:
    """The program's error comes first, then the row's; its exit code is kept, and the next row is not started."""
    command = ("--run", "ablation/relu", "ablation/silu", "--runs", str(tmp_path), "--processes", "1", "--")
    failed = reproduce(*command, f"data.root={images}", "global_batch_size=64")
    assert failed.code == 2
    assert [line.split(":")[1].strip() for line in failed.errors] == ["global_batch_size=64", "row=ablation/relu"]
    assert "silu" not in failed.stdout
