"""Result files: CSV files that start with timm's columns, so that both can be read together."""

import csv
from pathlib import Path

from metaformer.errors import UserError

TIMM_HEADER = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
HEADER = (*TIMM_HEADER, "images", "data", "checkpoint", "mean", "std")


def check_results(path: Path) -> None:
    """Check before an evaluation that its row can be appended; create the file's folder, but not the file."""
    try:
        _check_header(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        created = not path.exists()
        path.open("a").close()
        if created:
            path.unlink()
    except OSError as error:
        raise UserError(f"results_csv={path}: cannot be written ({error.strerror or error})") from error


def append_result(path: Path, row: dict[str, str | int | float]) -> None:
    """Append one row to a results CSV; write the header first if the file is missing or empty.

    Args:
        path: the file; its folder is created.
        row: a value for each column of HEADER except the two error columns. top1 and top5 are in percent, and
            param_count is the number of parameters.
    """
    values = dict(row)
    for name in ("top1", "top5"):
        values[f"{name}_err"] = f"{100 - float(row[name]):.3f}"
        values[name] = f"{float(row[name]):.3f}"
    values["param_count"] = f"{float(row['param_count']) / 1e6:.2f}"
    try:
        exists = _check_header(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lacks_newline = exists and not path.read_bytes().endswith(b"\n")
        with path.open("a", newline="") as file:
            if lacks_newline:  # an editor may omit it on the last line
                file.write("\r\n")
            writer = csv.DictWriter(file, HEADER)
            if not exists:
                writer.writeheader()
            writer.writerow(values)
    except OSError as error:
        raise UserError(f"results_csv={path}: cannot be written ({error.strerror or error})") from error


def _check_header(path: Path) -> bool:
    """Return True for a file with HEADER, False for a missing or empty file; raise an error for any other header."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open(newline="", errors="replace") as file:
        try:
            header = next(csv.reader(file), [])
        except csv.Error:  # not a CSV file
            header = []
    if tuple(header) != HEADER:
        raise UserError(f"results_csv={path}: unexpected header ({','.join(header)[:80]}); choose another file")
    return True
