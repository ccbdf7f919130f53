"""Metrics as files in the run folder: metrics.jsonl, a row a line, and summary.csv, a line an epoch.

A full disk does not stop training: rows wait until they can be written (`LineFile`), the summary until the next epoch.
"""

import csv
import io
import json
import math
import sys
from pathlib import Path

from metaformer.files import write_text_whole
from metaformer.tracking.line_file import LineFile, read_objects
from metaformer.tracking.tracker import NullTracker, Row


class JsonlTracker(NullTracker):
    """Appends to RUN/metrics.jsonl and rewrites RUN/summary.csv after each validation.

    Rows after step `resumed_at`, left by a run that died after its last checkpoint, go to metrics.superseded.jsonl:
    their steps are done again.
    """

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        self._path, self._summary = run_dir / "metrics.jsonl", run_dir / "summary.csv"
        rows = _read(self._path)
        kept = [row for row in rows if row["step"] <= resumed_at]
        if len(kept) < len(rows):
            superseded = _read(run_dir / "metrics.superseded.jsonl") + [r for r in rows if r["step"] > resumed_at]
            _write(run_dir / "metrics.superseded.jsonl", superseded)
        if self._path.exists():  # also without a last line that was half written
            _write(self._path, kept)
        self._validations = [row for row in kept if row["kind"] == "validation"]
        self._file = LineFile(self._path)

    def metrics(self, row: Row) -> None:
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self._file.write(json.dumps(row))
        if row["kind"] == "validation":
            self._validations.append(row)
            try:
                write_text_whole(self._summary, _csv(self._validations))
            except OSError as error:
                print(f"warning: {self._summary}: cannot be written ({error.strerror or error})", file=sys.stderr)

    def close(self, failed: bool) -> None:
        self._file.close()


def _read(path: Path) -> list[Row]:
    return read_objects(path, {"kind": str, "epoch": int, "step": int, "samples": int}, may_end_within=True)


def _write(path: Path, rows: list[Row]) -> None:
    write_text_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def _csv(rows: list[Row]) -> str:
    buffer = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row if name != "kind")
    writer = csv.DictWriter(buffer, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
