"""Draws curves of runs as SVG for an HTML page, whose style sheet sets the colours and the font."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaformer.reporting.run_record import RunRecord, is_number

MAX_POINTS = 400  # per curve; longer curves are averaged, so that a report of 300 epochs stays small
LOG_RANGE = 50  # ratio of largest to smallest value from which an axis is logarithmic
COLOURS = 8  # number of colours for curves in the style sheet
DASHES = ("solid", "dashed", "dotted")
_PAPER_DASH = "dotted"
# Colours that the SVG contains in place of the style sheet's variables --colour-0 and so on.
_INK, _GRID, _COLOUR = "#a000f0", "#a000f1", "#a000{:02x}"
_STYLE: Any = {
    "svg.fonttype": "none", "font.size": 8.5, "text.parse_math": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": _GRID, "xtick.color": _GRID,
    "ytick.color": _GRID, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.labelcolor": _INK,
    "text.color": _INK, "grid.color": _GRID, "grid.linewidth": 0.6, "ytick.left": False, "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}  # fmt: skip


class Curve(NamedTuple):
    """A figure of the rows of one kind."""

    label: str
    kind: str  # "train" or "validation"
    figure: str
    scale: float = 1.0


class Plot(NamedTuple):
    """The curves of one pair of axes."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    format: str = "{:.2f}"
    may_be_log: bool = False


TOP1 = Plot("Top-1", "%", (Curve("weights", "validation", "top1"), Curve("EMA", "validation", "ema_top1")))
PLOTS = (
    TOP1,
    Plot("Top-5", "%", (Curve("weights", "validation", "top5"), Curve("EMA", "validation", "ema_top5"))),
    Plot(
        "Loss",
        "",
        (
            Curve("training", "train", "loss"),
            Curve("validation", "validation", "loss"),
            Curve("validation, EMA", "validation", "ema_loss"),
        ),
        "{:.3f}",
    ),
    Plot("Learning rate", "", (Curve("", "train", "lr"),), "{:.2e}"),
    Plot("Gradient norm", "", (Curve("", "train", "grad_norm"),), may_be_log=True),
    Plot("Throughput", "images/s", (Curve("", "train", "images_per_second"),), "{:,.0f}"),
    Plot("Waiting for data", "% of the time", (Curve("", "train", "data_wait", 100.0),), "{:.1f}"),
    Plot("Skipped steps", "so far", (Curve("", "train", "skipped_steps"),), "{:.0f}"),
    Plot("GPU memory, peak", "GiB", (Curve("", "train", "memory_gib"),), "{:.1f}"),
)
ONLY_WHERE_NOT_ZERO = ("skipped_steps", "memory_gib")


@dataclass(frozen=True)
class Chart:
    """A chart for the page.

    Attributes:
        latest: the last value of the first curve, as text; "" for several runs.
        legend: label, colour (-1: the text's) and dash of each kind of curve, where there are several.
    """

    title: str
    unit: str
    latest: str
    legend: list[tuple[str, int, str]]
    svg: str


Points = tuple[list[float], list[float]]


def make_charts(records: Sequence[RunRecord], reference: float | None = None) -> list[Chart]:
    """Return the charts for which the runs have rows.

    Args:
        records: one run, or several runs to compare, each in its own colour.
        reference: the paper's top-1 in percent, drawn as a line.
    """
    by_epoch = all(record.samples_per_epoch for record in records)
    return [chart for plot in PLOTS if (chart := _chart(plot, records, by_epoch, reference if plot is TOP1 else None))]


def _chart(plot: Plot, records: Sequence[RunRecord], by_epoch: bool, reference: float | None) -> Chart | None:
    lines: list[tuple[str, int, str, Points]] = []  # label, colour, dash, points
    for number, record in enumerate(records):
        for index, curve in enumerate(plot.curves):
            points = _points(record, curve, record.samples_per_epoch if by_epoch else None)
            values = [value for value in points[1] if math.isfinite(value)]
            if not values or (curve.figure in ONLY_WHERE_NOT_ZERO and not any(values)):
                continue
            if len(records) > 1:
                lines.append((curve.label, number % COLOURS, DASHES[index], points))
            else:
                lines.append((curve.label, index, DASHES[0], points))
    if not lines:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.3), layout="constrained")
        axes = figure.subplots()
        _draw(axes, lines, plot.may_be_log)
        if reference is not None:
            axes.axhline(reference, color=_INK, linewidth=1, linestyle=_PAPER_DASH)
        if len(records) == 1:
            for x in _resumes(records[0], by_epoch):
                axes.axvline(x, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel("epoch" if by_epoch else "images seen")
        svg = _to_svg(figure, plot.title)
    several = len(records) > 1
    legend = list(dict.fromkeys((label, -1 if several else colour, dash) for label, colour, dash, _ in lines if label))
    if reference is not None:
        legend.append((f"paper, {reference:g} %", -1, _PAPER_DASH))
    last = [value for value in lines[0][3][1] if math.isfinite(value)][-1]
    latest = "" if several else plot.format.format(last)
    return Chart(plot.title, plot.unit, latest, legend if len(legend) > 1 else [], svg)


def _draw(axes: Axes, lines: Sequence[tuple[str, int, str, Points]], may_be_log: bool) -> None:
    for _, colour, dash, (x, y) in lines:
        marker = "o" if len(x) <= 40 else ""  # a single point has no line
        axes.plot(x, y, color=_COLOUR.format(colour), linestyle=dash, marker=marker, markersize=2.2)
    values = [value for line in lines for value in line[3][1] if math.isfinite(value)]
    if may_be_log and min(values) > 0 and max(values) / min(values) > LOG_RANGE:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlim(left=0)
    axes.grid(axis="y")


def _points(record: RunRecord, curve: Curve, samples_per_epoch: float | None) -> Points:
    """Return the curve's points; values that are not finite numbers become NaN, which interrupts the line."""
    rows = record.train_rows if curve.kind == "train" else record.validations
    values: list[tuple[float, Any]] = [
        (row["samples"] / (samples_per_epoch or 1), row.get(curve.figure)) for row in rows
    ]
    pairs = [(x, float(y) * curve.scale if is_number(y) else math.nan) for x, y in values]
    size = math.ceil(len(pairs) / MAX_POINTS) or 1
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    means = [_mean([y for _, y in group if math.isfinite(y)]) for group in groups]
    return [group[-1][0] for group in groups], means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _resumes(record: RunRecord, by_epoch: bool) -> list[float]:
    """Return where the run resumed, in epochs or images."""
    last = record.rows[-1] if record.rows else None
    if last is None or not last["step"]:
        return []
    images_per_step = last["samples"] / last["step"]
    scale = images_per_step / ((record.samples_per_epoch or 1) if by_epoch else 1)
    return [step * scale for step in record.resumed_steps if step <= last["step"]]


def _to_svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element whose colours are the style sheet's and whose ids are unique in the page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?!m|p)[^"]*"| id="(?:patch|matplotlib)[^"]*"', "", svg)  # all but markers and clip paths
    svg = re.sub(r"font-family: [^;\"]*;?|(<svg [^>]*?) width=\"[^\"]*\" height=\"[^\"]*\"", r"\1", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = svg.replace(_INK, "var(--ink-2)").replace(_GRID, "var(--grid)")
    return re.sub(r"#a000([0-9a-f]{2})", lambda found: f"var(--colour-{int(found[1], 16)})", svg)
