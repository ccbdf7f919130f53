"""Metrics files in the run folder: metrics.jsonl with one row per line, and summary.csv with one line per epoch.

A full disk does not stop training: rows are kept until they can be written (`LineFile`), and the summary is written
again after the next epoch.
"""

import csv
import io
import sys
from pathlib import Path

from metaformer.files import null_where_not_finite, to_json, write_text_atomically
from metaformer.interfaces import Row
from metaformer.tracking.line_file import LineFile, read_objects
from metaformer.tracking.tracker import NullTracker

ROW_TYPES = {"kind": str, "epoch": int, "step": int, "samples": int}  # what each row has


class JsonlTracker(NullTracker):
    """A tracker that appends to RUN/metrics.jsonl, and rewrites RUN/summary.csv after each validation.

    When a run resumes, rows that training will write again are moved to metrics.superseded.jsonl: rows after step
    `resumed_at`, and the validation and final rows of that step unless `validated`.

    Args:
        resumed_at: Step of the checkpoint from which training resumes; 0 for a new run.
        validated: Whether the checkpoint was saved after the validation of its step.
    """

    def __init__(self, run_dir: Path, resumed_at: int, validated: bool = False) -> None:
        self._path, self._summary = run_dir / "metrics.jsonl", run_dir / "summary.csv"
        rows = _read(self._path)
        kept: list[Row] = []
        superseded: list[Row] = []
        for row in rows:
            done = row["step"] < resumed_at or (row["step"] == resumed_at and (validated or row["kind"] == "train"))
            (kept if done else superseded).append(row)
        if superseded:
            _write(run_dir / "metrics.superseded.jsonl", _read(run_dir / "metrics.superseded.jsonl") + superseded)
        if self._path.exists():  # also drops a partial last line
            _write(self._path, kept)
        self._validations = [row for row in kept if row["kind"] == "validation"]
        if self._summary.exists():
            write_text_atomically(self._summary, _csv(self._validations))
        self._file = LineFile(self._path)

    def metrics(self, row: Row) -> None:
        self._file.write(to_json(row))
        if row["kind"] == "validation":
            self._validations.append(null_where_not_finite(row))
            try:
                write_text_atomically(self._summary, _csv(self._validations))
            except OSError as error:
                print(f"warning: {self._summary}: cannot be written ({error.strerror or error})", file=sys.stderr)

    def close(self, failed: bool) -> None:
        self._file.close()


def ends_with_final(run_dir: Path, step: int) -> bool:
    """Return whether the last row of RUN/metrics.jsonl is the final row of a run that ended at this step."""
    rows = _read(run_dir / "metrics.jsonl")
    return bool(rows) and (rows[-1]["kind"], rows[-1]["step"]) == ("final", step)


def _read(path: Path) -> list[Row]:
    return read_objects(path, ROW_TYPES, allow_partial_last_line=True)


def _write(path: Path, rows: list[Row]) -> None:
    write_text_atomically(path, "".join(to_json(row) + "\n" for row in rows))


def _csv(rows: list[Row]) -> str:
    buffer = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row if name != "kind")
    writer = csv.DictWriter(buffer, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
