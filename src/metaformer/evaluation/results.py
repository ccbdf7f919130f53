"""Result files: a CSV with timm's header first, so that both can be read together."""

import csv
from pathlib import Path

from metaformer.errors import UserError

TIMMS_HEADER = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
HEADER = (*TIMMS_HEADER, "images", "data", "checkpoint", "mean", "std")


def check_results(path: Path) -> None:
    """Find out before an evaluation whether its row can be appended; makes the file's folder, not the file.

    Raises:
        UserError: the file has another header, or cannot be written.
    """
    try:
        _check_header(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = not path.exists()
        path.open("a").close()
        if made:
            path.unlink()
    except OSError as error:
        raise UserError(f"results_csv={path}: cannot be written ({error.strerror or error})") from error


def append_result(path: Path, row: dict[str, str | int | float]) -> None:
    """Append one row to a results CSV, made with its header where it does not exist.

    Args:
        row: a value for each column of HEADER but the two error columns; top1 and top5 in percent, parameters counted.

    Raises:
        UserError: the file has another header, or cannot be written.
    """
    values = dict(row)
    for name in ("top1", "top5"):
        values[f"{name}_err"] = f"{100 - float(row[name]):.3f}"
        values[name] = f"{float(row[name]):.3f}"
    values["param_count"] = f"{float(row['param_count']) / 1e6:.2f}"
    try:
        exists = _check_header(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = exists and not path.read_bytes().endswith(b"\n")
        with path.open("a", newline="") as file:
            if unfinished:  # an editor left out the last line's end
                file.write("\r\n")
            writer = csv.DictWriter(file, HEADER)
            if not exists:
                writer.writeheader()
            writer.writerow(values)
    except OSError as error:
        raise UserError(f"results_csv={path}: cannot be written ({error.strerror or error})") from error


def _check_header(path: Path) -> bool:
    """Whether there is a file with this header; one that is empty, or not there, gets it."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open(newline="", errors="replace") as file:
        try:
            header = next(csv.reader(file), [])
        except csv.Error:  # a line that no CSV has
            header = []
    if tuple(header) != HEADER:
        raise UserError(f"results_csv={path}: another header ({','.join(header)[:80]}); give another file")
    return True
