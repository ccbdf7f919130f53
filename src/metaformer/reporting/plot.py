"""Top-1 against parameters and multiply-accumulates: the paper's rows, and ours where there are any."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from metaformer.reporting.paper import Row, Table
from metaformer.reporting.table import Comparison

COLOURS = {Table.paper: "tab:blue", Table.longer: "tab:cyan", Table.ablation: "tab:orange", Table.comparison: "0.6"}
LOWEST_TOP1 = 68  # rows below are left out: the three ablations that do not learn would squeeze the rest


def save_plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write a PNG: hollow marks are the paper's numbers, full ones ours."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_parameters, by_macs = figure.subplots(1, 2, sharey=True)
    _draw(by_parameters, comparisons, lambda row: row.parameters)
    _draw(by_macs, comparisons, lambda row: row.gmacs)
    by_parameters.set(xlabel="parameters (millions)", ylabel="top-1 on ImageNet-1K (%)")
    by_macs.set(xlabel="multiply-accumulates of an image (billions)")
    by_macs.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, comparisons: Sequence[Comparison], size: Callable[[Row], float]) -> None:
    for table, colour in COLOURS.items():
        shown = [c for c in comparisons if c.row.table is table]
        paper = [(size(c.row), c.row.top1) for c in shown if c.row.top1 >= LOWEST_TOP1]
        axes.scatter(*zip(*paper, strict=True), facecolors="none", edgecolors=colour, label=f"{table.value}: paper")
        ours = [(size(c.row), c.ours.top1) for c in shown if c.ours.top1 is not None and c.ours.top1 >= LOWEST_TOP1]
        if ours:
            axes.scatter(*zip(*ours, strict=True), color=colour, label=f"{table.value}: ours")
    line = [(size(c.row), c.row.top1) for c in comparisons if c.row.table is Table.paper]
    axes.plot(*zip(*line, strict=True), color=COLOURS[Table.paper], linewidth=0.8)
    for c in comparisons:
        if c.row.table is Table.paper:
            label = c.row.name.rsplit("_", 1)[1].upper()
            axes.annotate(label, (size(c.row), c.row.top1), xytext=(-4, 5), textcoords="offset points", ha="right")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
