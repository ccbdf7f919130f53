"""Writes the report of a run, or a comparison of several runs, as one HTML file that needs no network.

Run as a program with a run folder, it writes RUN/report.html: `python -m metaformer.reporting.run_report RUN`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metaformer.death_signal import set_parent_death_signal
from metaformer.errors import UserError, one_line, printable
from metaformer.files import write_text_atomically
from metaformer.goodput import PHASES, TRAINING
from metaformer.reporting.class_results import ClassAccuracy
from metaformer.reporting.curves import COLOURS, make_charts
from metaformer.reporting.paper import ROWS, Row
from metaformer.reporting.run_record import RunRecord, is_number, read_record
from metaformer.signals import STOP_SIGNALS

REPORT_FILE = "report.html"
GENERATOR = '<meta name="generator" content="metaformer">'  # identifies a report
MAX_EPOCHS_SHOWN = 400
CLASSES_SHOWN = 20  # number of the worst and of the best; up to twice as many classes are in one table
MAX_CLASSES = 1000  # in the table of all
# Settings that differ between any two runs.
NOT_COMPARED = ("run_dir", "tracking.name")


class Tile(NamedTuple):
    """A figure at the head of the report."""

    title: str
    value: str
    note: str = ""


class Phase(NamedTuple):
    """A part of the time of all starts."""

    name: str
    share: float  # percent
    seconds: str
    colour: int


def make_report(records: Sequence[RunRecord], price_per_hour: float | None = None) -> str:
    """Return the report as HTML.

    Args:
        records: one run, or several to compare.
        price_per_hour: price of a GPU; None takes the run's configuration.
    """
    record, paper = records[0], find_paper_row(records[0])
    prices = [_price(each, price_per_hour) for each in records]
    loader = Environment(
        loader=PackageLoader("metaformer.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader.filters["value"] = format_value
    return loader.get_template("report.html.jinja").render(
        generator=Markup(GENERATOR),
        title=record.name if len(records) == 1 else f"{len(records)} runs",
        records=records,
        record=record,
        is_comparison=len(records) > 1,
        colours=COLOURS,
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        tiles=list(_tiles(record, paper, prices[0])),
        charts=[
            (chart, Markup(chart.svg)) for chart in make_charts(records, paper.top1 if paper is not None else None)
        ],
        phases=list(_phases(record)),
        summaries=[dict(_summary(each, price)) for each, price in zip(records, prices, strict=True)],
        differences=_differences(records),
        class_tables=_class_tables(record),
        epochs=record.validations[-MAX_EPOCHS_SHOWN:],
        epoch_columns=_columns(record),
        settings=[
            (name, list(group))
            for name, group in groupby(sorted(record.settings.items(), key=_by_group), lambda item: _by_group(item)[0])
        ],
        packages=_dict(record.environment.get("packages")),
        commit=str(_dict(record.environment.get("git")).get("commit") or ""),
        devices=", ".join(map(str, record.environment.get("devices") or [])),
        command=_command(record),
    )


def find_paper_row(record: RunRecord) -> Row | None:
    """Return the paper's row that a run reproduces: the one of its recipe, or of its network with the defaults."""
    recipes = [text.removeprefix("experiment=") for text in record.overrides if text.startswith("experiment=")]
    if recipes:
        return next((row for row in ROWS if row.name == recipes[-1] and row.has_recipe), None)
    wanted = [record.settings.get(name) for name in ("model.name", "image_size", "data.name")]
    return next((row for row in ROWS if row.has_recipe and [row.model, row.image_size, "imagenet"] == wanted), None)


def format_value(value: Any) -> str:
    """Return a value as it is written on the command line; text is unchanged."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return printable(value, 2000) if isinstance(value, str) else printable(json.dumps(value, default=str), 2000)


def _tiles(record: RunRecord, paper: Row | None, price: float | None) -> Iterator[Tile]:
    """Yield the figures for the head of the report, as far as they are known."""
    best = _best(record)
    if best is not None:
        row, figure = best
        weights = " (EMA)" if figure.startswith("ema_") else ""
        yield Tile("Best top-1", f"{row[figure]:.2f} %", f"epoch {row['epoch']}{weights}")
        if paper is not None:
            yield Tile("The paper's top-1", f"{paper.top1:g} %", f"{row[figure] - paper.top1:+.2f} here")
        last = record.validations[-1]
        yield Tile("Last top-5", _number(last.get("top5"), "{:.2f} %"), f"epoch {last['epoch']}")
        yield Tile("Last loss", _number(last.get("loss"), "{:.3f}"), "validation")
    train = record.train_rows
    speeds = [row["images_per_second"] for row in train if is_number(row.get("images_per_second"))]
    if speeds:
        yield Tile("Throughput", f"{median(speeds):,.0f} /s", "images, median")
    if train and train[-1].get("memory_gib"):
        yield Tile("GPU memory", _number(train[-1]["memory_gib"], "{:.1f} GiB"), "peak of rank 0")
    seconds = record.seconds
    if seconds:
        share = 100 * seconds.get(TRAINING, 0.0) / sum(seconds.values())
        yield Tile("Goodput", f"{share:.1f} %", f"of {duration(sum(seconds.values()))}")
    hours, unit = record.device_hours, "GPU" if _on_gpus(record) else "Process"
    if hours is not None:
        yield Tile(f"{unit} hours", f"{hours:,.2f}", f"{record.ranks} rank{'s' * (record.ranks != 1)}")
        if price is not None:
            yield Tile("Cost", f"{hours * price:,.2f}", f"at {price:g} an hour")
    if train and train[-1].get("skipped_steps"):
        yield Tile("Skipped steps", str(train[-1]["skipped_steps"]), "gradients not finite")
    if is_number(record.status.get("starts")):
        yield Tile("Starts", str(record.status["starts"]), f"{len(record.resumed_steps)} resumed")


def _summary(record: RunRecord, price: float | None) -> Iterator[tuple[str, str]]:
    """Yield a run's cells of the table that compares runs."""
    best, last = _best(record), record.rows[-1] if record.rows else None
    speeds = [row["images_per_second"] for row in record.train_rows if is_number(row.get("images_per_second"))]
    hours = record.device_hours
    yield "State", record.state
    yield "Epoch", str(last["epoch"]) if last else ""
    yield "Step", f"{last['step']:,}" if last else ""
    yield "Best top-1", f"{best[0][best[1]]:.2f} %" if best else ""
    yield "Last top-1", _number(record.validations[-1].get("top1"), "{:.2f} %") if record.validations else ""
    yield "Images/s", f"{median(speeds):,.0f}" if speeds else ""
    yield "GPU or process hours", f"{hours:,.2f}" if hours is not None else ""
    yield "Cost", f"{hours * price:,.2f}" if hours is not None and price is not None else ""


def _best(record: RunRecord) -> tuple[dict[str, Any], str] | None:
    """Return the validation with the highest top-1 of weights or EMA, and the name of that figure.

    As for `checkpoints/best`, only those after whole epochs count, where there are any.
    """
    rows = [row for row in record.validations if row["kind"] == "validation"] or record.validations
    found = [(row, figure) for row in rows for figure in ("top1", "ema_top1") if is_number(row.get(figure))]
    return max(found, key=lambda pair: float(pair[0][pair[1]]), default=None)


def _phases(record: RunRecord) -> Iterator[Phase]:
    total = sum(record.seconds.values())
    for colour, name in enumerate(PHASES):
        if seconds := record.seconds.get(name):
            yield Phase(name, 100 * seconds / total, duration(seconds), colour)


class ClassTable(NamedTuple):
    """A table of classes; long ones are folded."""

    title: str
    classes: list[ClassAccuracy]
    is_folded: bool = False


def _class_tables(record: RunRecord) -> list[ClassTable]:
    classes = record.classes
    if len(classes) <= 2 * CLASSES_SHOWN:
        return [ClassTable(f"All {len(classes)}, worst first", classes)] if classes else []
    tables = [
        ClassTable(f"Worst {CLASSES_SHOWN}", classes[:CLASSES_SHOWN]),
        ClassTable(f"Best {CLASSES_SHOWN}", classes[: -CLASSES_SHOWN - 1 : -1]),
    ]
    if len(classes) <= MAX_CLASSES:
        tables.append(ClassTable(f"All {len(classes):,}, worst first", classes, is_folded=True))
    return tables


def _differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the settings in which runs differ, each with the value of every run."""
    names = dict.fromkeys(name for record in records for name in record.settings if name not in NOT_COMPARED)
    found = [(name, [format_value(record.settings.get(name)) for record in records]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _columns(record: RunRecord) -> list[str]:
    """Return the figures that any validation has, without those that are the same in all."""
    hidden = ("kind", "epoch", "step", "samples", "images", "quarantined")
    names = dict.fromkeys(name for row in record.validations for name in row if name not in hidden)
    return [name for name in names if any(is_number(row.get(name)) for row in record.validations)]


def _by_group(item: tuple[str, Any]) -> tuple[str, str]:
    """Sort settings without a group first."""
    name = item[0]
    return (name.split(".")[0] if "." in name else "", name)


def _command(record: RunRecord) -> str:
    command = record.environment.get("command")
    return printable(" ".join(map(str, command)), 2000) if isinstance(command, list) else ""


def _price(record: RunRecord, given: float | None) -> float | None:
    price = record.settings.get("report.price_per_hour") if given is None else given
    return float(price) if is_number(price) else None  # type: ignore[arg-type]


def _on_gpus(record: RunRecord) -> bool:
    return any(row.get("memory_gib") for row in record.train_rows)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any, form: str) -> str:
    return form.format(value) if is_number(value) else "not finite"


def duration(seconds: float) -> str:
    """Return a duration in at most two units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def write_report(run_dir: Path) -> None:
    """Write RUN/report.html."""
    file = run_dir / REPORT_FILE
    text = make_report([read_record(run_dir)])
    try:
        write_text_atomically(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error


def main() -> None:
    """Write the report of the run folder that is the only argument; an error is one line on stderr."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the training process decides when to stop
    set_parent_death_signal(signal.SIGKILL)
    os.nice(10)  # training comes first
    try:
        write_report(Path(sys.argv[1]))
    except Exception as error:  # any: it is one warning of the training process
        sys.exit(one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}")


if __name__ == "__main__":
    main()
