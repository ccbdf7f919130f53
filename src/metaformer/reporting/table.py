"""Tables that compare the paper's results with ours, as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from metaformer.reporting.outcomes import Outcome
from metaformer.reporting.paper import Row, Table

HEADER = (
    "row", "parameters (M)", "GMACs", "top-1, paper", "top-1, ours", "difference", "images", "run folder", "note",
    "top-1, released weights here",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One row of the paper with our results for it."""

    row: Row
    ours: Outcome  # trained here
    released: Outcome  # the released weights, evaluated here

    def cells(self) -> tuple[str, ...]:
        """Return the cells as text in the order of HEADER; the paper's number is only in the paper's column."""
        row, ours, released = self.row, self.ours, self.released
        return (
            row.name,
            f"{row.parameters:g}",
            f"{row.gmacs:.1f}",
            f"{row.top1:.1f}",
            ours.note if ours.top1 is None else f"{ours.top1:.2f}",
            "" if ours.top1 is None else f"{ours.top1 - row.top1:+.2f}",
            "" if ours.images is None else f"{ours.images:,}",
            "" if ours.source is None else str(ours.source),
            "" if ours.top1 is None else ours.note,
            released.note if released.top1 is None else " ".join(filter(None, (f"{released.top1:.2f}", released.note))),
        )


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return a heading and a table for each table of the papers."""
    lines = ["# Top-1 on ImageNet-1K, single crop, 224 px unless the table says otherwise", ""]
    for table in Table:
        lines += [f"## {table.value}", "", _line(HEADER), _line(["---"] * len(HEADER))]
        lines += [_line(comparison.cells()) for comparison in comparisons if comparison.row.table is table]
        lines += [""]
    return "\n".join(lines)


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """Return one table, with the name of the paper's table as the first column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("table", *HEADER))
    writer.writerows((comparison.row.table.value, *comparison.cells()) for comparison in comparisons)
    return text.getvalue()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
