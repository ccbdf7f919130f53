"""Plot of top-1 against parameters and multiply-accumulates, for the paper's rows and this project's results."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from metaformer.reporting.paper import Row, Table
from metaformer.reporting.table import Comparison

COLOURS = {
    Table.paper: "tab:blue", Table.longer: "tab:cyan", Table.ablation: "tab:orange", Table.comparison: "0.6",
    Table.baselines: "tab:green", Table.baselines_384: "tab:olive", Table.baselines_21k: "tab:red",
    Table.baselines_21k_384: "tab:purple",
}  # fmt: skip
MIN_TOP1 = 68  # lower values are drawn here: ablations that do not learn would compress the rest of the plot


def save_plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write a PNG with hollow circles for the paper, filled circles for our runs and crosses for released weights."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    by_parameters, by_macs = figure.subplots(1, 2, sharey=True)
    _draw(by_parameters, comparisons, lambda row: row.parameters)
    _draw(by_macs, comparisons, lambda row: row.gmacs)
    by_parameters.set(
        xlabel="parameters (millions)", ylabel=f"top-1 on ImageNet-1K (%); on the edge: {MIN_TOP1} or less"
    )
    by_macs.set(xlabel="multiply-accumulates of an image (billions)")
    figure.legend(*by_macs.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _draw(axes: Axes, comparisons: Sequence[Comparison], size: Callable[[Row], float]) -> None:
    for table, colour in COLOURS.items():
        shown = [c for c in comparisons if c.row.table is table]
        paper = [(size(c.row), max(MIN_TOP1, c.row.top1)) for c in shown]
        axes.scatter(*zip(*paper, strict=True), facecolors="none", edgecolors=colour, label=f"{table.value}: paper")
        for what, marker in (("ours", "o"), ("released weights", "x")):
            outcomes = [(c.row, c.ours if what == "ours" else c.released) for c in shown]
            found = [(size(row), max(MIN_TOP1, o.top1)) for row, o in outcomes if o.top1 is not None]
            if found:
                axes.scatter(*zip(*found, strict=True), color=colour, marker=marker, label=f"{table.value}: {what}")
    line = [(size(c.row), c.row.top1) for c in comparisons if c.row.table is Table.paper]
    axes.plot(*zip(*line, strict=True), color=COLOURS[Table.paper], linewidth=0.8)
    for c in comparisons:
        if c.row.table is Table.paper:
            label = c.row.name.rsplit("_", 1)[1].upper()
            text = axes.annotate(
                label, (size(c.row), c.row.top1), (-4, 4), textcoords="offset points", ha="right", size=8
            )
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])  # over the points behind it
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
