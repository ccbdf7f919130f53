"""Metrics as files in the run folder: metrics.jsonl, a row a line, and summary.csv, a line an epoch.

A full disk does not stop training: rows wait until they can be written (`LineFile`), the summary until the next epoch.
"""

import csv
import io
import sys
from pathlib import Path

from metaformer.files import null_where_not_finite, to_json, write_text_atomically
from metaformer.interfaces import Row
from metaformer.tracking.line_file import LineFile, read_objects
from metaformer.tracking.tracker import NullTracker


class JsonlTracker(NullTracker):
    """Appends to RUN/metrics.jsonl and rewrites RUN/summary.csv after each validation.

    Rows that training writes again, left by a run that died after its last checkpoint, go to metrics.superseded.jsonl:
    those after step `resumed_at`, and the validation and final rows of that step unless the checkpoint is `validated`.

    Args:
        resumed_at: the checkpoint's step; 0 at the beginning.
        validated: the checkpoint was saved after the validation of its step.
    """

    def __init__(self, run_dir: Path, resumed_at: int, validated: bool = False) -> None:
        self._path, self._summary = run_dir / "metrics.jsonl", run_dir / "summary.csv"
        rows = _read(self._path)
        kept: list[Row] = []
        again: list[Row] = []
        for row in rows:
            done = row["step"] < resumed_at or (row["step"] == resumed_at and (validated or row["kind"] == "train"))
            (kept if done else again).append(row)
        if again:
            _write(run_dir / "metrics.superseded.jsonl", _read(run_dir / "metrics.superseded.jsonl") + again)
        if self._path.exists():  # also without a last line that was half written
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
    """Whether the last row of RUN/metrics.jsonl is the final one of a run that ended at this step."""
    rows = _read(run_dir / "metrics.jsonl")
    return bool(rows) and (rows[-1]["kind"], rows[-1]["step"]) == ("final", step)


def _read(path: Path) -> list[Row]:
    return read_objects(path, {"kind": str, "epoch": int, "step": int, "samples": int}, may_end_within=True)


def _write(path: Path, rows: list[Row]) -> None:
    write_text_atomically(path, "".join(to_json(row) + "\n" for row in rows))


def _csv(rows: list[Row]) -> str:
    buffer = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row if name != "kind")
    writer = csv.DictWriter(buffer, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
