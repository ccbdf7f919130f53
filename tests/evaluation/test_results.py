"""Result files with timm's columns."""

import csv
from pathlib import Path

import pytest

from metaformer.errors import UserError
from metaformer.evaluation.results import HEADER, TIMM_HEADER, append_result, check_results

ROW: dict[str, str | int | float] = {
    "model": "poolformer_s12", "img_size": 224, "top1": 77.2284, "top5": 93.5, "param_count": 11_915_176,
    "crop_pct": 0.9, "interpolation": "bicubic", "images": 50_000, "data": "imagenet", "checkpoint": "runs/a, b/model",
    "mean": "0.5 0.5 0.5", "std": "0.2 0.2 0.2",
}  # fmt: skip
LINE = ["poolformer_s12", "224", "77.228", "22.772", "93.500", "6.500", "11.92", "0.9", "bicubic",
        "50000", "imagenet", "runs/a, b/model", "0.5 0.5 0.5", "0.2 0.2 0.2"]  # fmt: skip


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_starts_with_timms_header(tmp_path: Path, content: str | None) -> None:
    """A new file in a new folder, or an empty file, gets the header and then the row."""
    path = tmp_path / "results" / "table.csv"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    append_result(path, ROW)
    assert read(path) == [list(HEADER), LINE]
    timms = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"
    assert ",".join(HEADER) == f"{timms},images,data,checkpoint,mean,std"


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""], ids=["unix", "dos", "none"])
def test_appends(tmp_path: Path, ending: str) -> None:
    """Rows are appended to existing rows, whatever the ending of the last line."""
    path = tmp_path / "table.csv"
    row = ",".join(["other", *(f'"{value}"' if "," in value else value for value in LINE[1:])])
    path.write_bytes((",".join(HEADER) + "\r\n" + row + ending).encode())
    append_result(path, ROW)
    append_result(path, ROW)
    assert read(path) == [list(HEADER), ["other", *LINE[1:]], LINE, LINE]


@pytest.mark.parametrize("header", ["model,top1", ",".join(TIMM_HEADER)], ids=["other", "timm's alone"])
def test_another_header_is_refused(tmp_path: Path, header: str) -> None:
    """A CSV with other columns is left unchanged and gives a one-line error with its path."""
    path = tmp_path / "table.csv"
    path.write_text(f"{header}\nx,1\n")
    pattern = rf"results_csv=\S+table\.csv: unexpected header \({header[:80]}\)"
    for refuse in (check_results, lambda path: append_result(path, ROW)):
        with pytest.raises(UserError, match=pattern) as caught:
            refuse(path)
        assert "\n" not in str(caught.value)
    assert path.read_text() == f"{header}\nx,1\n"


def test_unwritable(tmp_path: Path) -> None:
    """A folder in place of the file, or a file in place of its folder, gives a one-line error."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "table.csv"):
        for refuse in (check_results, lambda path: append_result(path, ROW)):
            with pytest.raises(UserError, match=r"results_csv=\S+: cannot be written \("):
                refuse(path)


def test_a_binary_file(tmp_path: Path) -> None:
    """A binary file gives a one-line error, too."""
    (tmp_path / "weights").write_bytes(b"\x80\xff" * 100_000)
    with pytest.raises(UserError, match="unexpected header"):
        check_results(tmp_path / "weights")


def test_checking_changes_nothing(tmp_path: Path) -> None:
    """A missing file is not created, and an existing file is not changed."""
    check_results(tmp_path / "results" / "table.csv")
    assert list((tmp_path / "results").iterdir()) == []
    append_result(tmp_path / "table.csv", ROW)
    before = (tmp_path / "table.csv").read_bytes()
    check_results(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == before
