"""The tables as Markdown, CSV and a plot."""

import csv
import io
from pathlib import Path

from PIL import Image

from metaformer.reporting.outcomes import Outcome
from metaformer.reporting.paper import ROWS, Table
from metaformer.reporting.plot import save_plot
from metaformer.reporting.table import HEADER, Comparison, to_csv, to_markdown

NOTHING = Outcome()
FOUND = Outcome(77.05, 50_000, Path("runs/a|b"), "not the recipe: seed=1")


def comparisons(ours: Outcome, released: Outcome = NOTHING) -> list[Comparison]:
    """Return all rows, with results for the first row only."""
    return [Comparison(row, ours if not i else NOTHING, released if not i else NOTHING) for i, row in enumerate(ROWS)]


def test_rows_that_were_not_run() -> None:
    """Without results, our columns contain no numbers."""
    for row in csv.DictReader(io.StringIO(to_csv(comparisons(NOTHING)))):
        assert row["top-1, ours"] == row["top-1, released weights here"] == "not run"
        assert row["difference"] == row["images"] == row["run folder"] == ""


def test_a_result_is_compared_with_the_papers() -> None:
    """The row shows both results, the signed difference, images and run folder; other rows have no numbers."""
    released = Outcome(77.238, 403, Path("results.csv"), "403 images, not 50,000")
    first, *rest = csv.DictReader(io.StringIO(to_csv(comparisons(FOUND, released))))
    assert first["table"] == "PoolFormer"
    assert [first[name] for name in HEADER] == [
        "paper/poolformer_s12", "11.9", "1.8", "77.2", "77.05", "-0.15", "50,000", "runs/a|b", "not the recipe: seed=1",
        "77.24 403 images, not 50,000",
    ]  # fmt: skip
    assert {row["top-1, ours"] for row in rest} == {"not run"}


def test_markdown_has_a_table_for_each_of_the_papers() -> None:
    """Each row is below its table's heading with as many cells as the header; bars in cells are escaped."""
    text = to_markdown(comparisons(FOUND))
    parts = text.split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == [table.value for table in Table]
    for part, table in zip(parts, Table, strict=True):
        lines = [line for line in part.splitlines() if line.startswith("| ")]
        assert len(lines) == 2 + sum(row.table is table for row in ROWS)
        assert {line.replace("\\|", "").count("|") for line in lines} == {len(HEADER) + 1}
    assert "runs/a\\|b" in text


def test_plot_shows_our_result(tmp_path: Path) -> None:
    """The plot is a PNG whose pixels change with our result."""
    without, with_one = tmp_path / "without.png", tmp_path / "with.png"
    save_plot(comparisons(NOTHING), without)
    save_plot(comparisons(FOUND), with_one)
    with Image.open(without) as one, Image.open(with_one) as other:
        assert one.format == "PNG"
        assert one.size == other.size
        assert one.tobytes() != other.tobytes()
