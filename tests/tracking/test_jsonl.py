"""Tests of metrics.jsonl and summary.csv."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from metaformer.tracking.jsonl import JsonlTracker


def row(step: int, kind: str = "train", **figures: Any) -> dict[str, Any]:
    return {"kind": kind, "epoch": 1 + step // 10, "step": step, "samples": 8 * step, **figures}


def write(run_dir: Path, resumed_at: int, *new: dict[str, Any], validated: bool = True) -> None:
    """Log rows as a process does that resumes at a step."""
    tracker = JsonlTracker(run_dir, resumed_at, validated)
    for each in new:
        tracker.metrics(each)
    tracker.close(failed=False)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_after_the_resume_point_are_set_aside(tmp_path: Path) -> None:
    """Rows of repeated steps move to metrics.superseded.jsonl, which grows with each resume."""
    write(tmp_path, 0, *(row(step, loss=1.0) for step in range(1, 7)))
    write(tmp_path, 4, *(row(step, loss=2.0) for step in range(5, 8)))
    write(tmp_path, 6, row(7, loss=3.0))
    kept = [(each["step"], each["loss"]) for each in read(tmp_path / "metrics.jsonl")]
    assert kept == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 3.0)]
    superseded = [(each["step"], each["loss"]) for each in read(tmp_path / "metrics.superseded.jsonl")]
    assert superseded == [(5, 1.0), (6, 1.0), (7, 2.0)]


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """No line has NaN or infinity, which JSON lacks, even after a resume has rewritten rows."""
    write(tmp_path, 0, row(1, loss=math.nan, ranks=[math.inf, {"wait": -math.inf}]), row(2, loss=1.0))
    write(tmp_path, 1, row(2, "validation", loss=math.inf))
    for name in ("metrics.jsonl", "metrics.superseded.jsonl"):
        text = (tmp_path / name).read_text()
        assert not any(word in text for word in ("NaN", "Infinity", "nan", "inf"))
    first, second = read(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["ranks"], second["loss"]) == (None, [None, {"wait": None}], None)
    assert (tmp_path / "summary.csv").read_text() == "epoch,step,samples,loss\n1,2,16,\n"


def test_a_repeated_validation(tmp_path: Path) -> None:
    """Resuming from a checkpoint saved before its step's validation supersedes the validation and final rows."""
    old = [row(5, top1=0.0), row(5, "validation", top1=1.0), row(5, "final", top1=1.0)]
    write(tmp_path, 0, *old)
    write(tmp_path, 5, validated=False)
    assert read(tmp_path / "metrics.jsonl") == old[:1]
    assert read(tmp_path / "metrics.superseded.jsonl") == old[1:]
    assert (tmp_path / "summary.csv").read_text().strip() == ""
    write(tmp_path, 5, *old[1:], validated=False)
    write(tmp_path, 5, validated=True)
    assert read(tmp_path / "metrics.jsonl") == old


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    """A killed process does not lose rows that it has logged."""
    tracker = JsonlTracker(tmp_path, 0)
    tracker.metrics(row(1, loss=1.0))
    assert [each["step"] for each in read(tmp_path / "metrics.jsonl")] == [1]
    tracker.close(failed=True)


@pytest.mark.parametrize("resumed_at", [2, 1], ids=["all-rows-count", "a-row-is-repeated"])
@pytest.mark.parametrize("ending", ['{"kind": "tr', json.dumps(row(3))], ids=["half", "no-newline"])
def test_half_written_last_line(tmp_path: Path, resumed_at: int, ending: str) -> None:
    """A row that a crash left half-written does not prevent this resume or the next."""
    write(tmp_path, 0, row(1), row(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(ending)
    write(tmp_path, resumed_at, row(resumed_at + 1))
    write(tmp_path, resumed_at + 1, row(resumed_at + 2))
    assert [each["step"] for each in read(tmp_path / "metrics.jsonl")] == list(range(1, resumed_at + 3))


@pytest.mark.parametrize("number", [1, 2], ids=["first", "last"])
def test_another_file_is_rejected(tmp_path: Path, number: int) -> None:
    """The error for a metrics.jsonl with another whole line names the line, and the file is not changed."""
    lines = [json.dumps(row(1))]
    lines.insert(number - 1, "epoch,loss")
    text = "\n".join(lines) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=rf"metrics\.jsonl: line {number} is not JSON; move the file away"):
        JsonlTracker(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_summary_has_a_line_per_epoch(tmp_path: Path) -> None:
    """summary.csv has a line per validation, with all fields but the kind; a resume adds no epoch twice."""
    write(tmp_path, 0, row(5), row(5, "validation", top1=1.0, loss=3.0), row(10, "validation", top1=2.0, loss=2.0))
    write(tmp_path, 5, row(10, "validation", top1=2.5, loss=2.0), row(10, "final", top1=2.5))
    with (tmp_path / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["epoch", "step", "samples", "top1", "loss"]
    assert [(line["step"], line["top1"]) for line in lines] == [("5", "1.0"), ("10", "2.5")]


def test_later_figures_get_a_column(tmp_path: Path) -> None:
    """Figures that first appear after a resume are in summary.csv, and are empty in earlier epochs."""
    write(tmp_path, 0, row(5, "validation", top1=1.0))
    write(tmp_path, 5, row(10, "validation", top1=2.0, ema_top1=3.0))
    with (tmp_path / "summary.csv").open(newline="") as file:
        assert [line["ema_top1"] for line in csv.DictReader(file)] == ["", "3.0"]
