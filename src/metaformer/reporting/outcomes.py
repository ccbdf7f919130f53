"""Results of the paper's rows, read from run folders and results files."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metaformer.errors import UserError
from metaformer.reporting.paper import Row

VALIDATION_IMAGES = 50_000  # in ImageNet-1K
# Settings that may differ from the recipe; differences in all others are noted in the table.
IGNORED_SETTINGS = (
    "run_dir", "data.root", "data.source", "seed", "workers", "loader.", "tracking.", "checkpoint.", "guards.",
    "report.", "resume", "eval_batch_size", "accumulation_steps", "channels_last", "compile", "log_every_steps",
    "max_steps",
)  # fmt: skip
Settings = dict[str, Any]  # dotted names to values
# Exceptions that a damaged file of a run folder can cause.
READ_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError, YAMLError,
    OmegaConfBaseException,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The result of a row.

    Attributes:
        top1: percent; None without a comparable result.
        images: number of validation images.
        source: the run folder or the results file.
        note: the reason for a missing result, or a remark about the result; may be empty.
    """

    top1: float | None = None
    images: int | None = None
    source: Path | None = None
    note: str = "not run"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return nested settings keyed by their dotted names."""
    flat: Settings = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def read_run(folder: Path, recipe: Mapping[str, Any]) -> Outcome:
    """Return the best validation of a run that has finished all its epochs.

    Args:
        folder: a run folder; it need not exist.
        recipe: the row's configuration, nested.
    """
    if not (folder / "config.yaml").is_file():
        return Outcome()
    try:
        return _read_run(folder, flatten(recipe))
    except READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Outcome(source=folder, note=f"damaged: {reason}")


def _read_run(folder: Path, recipe: Settings) -> Outcome:
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    validations = [line for line in lines if line["kind"] == "validation"]
    settings = flatten(config)
    epochs = settings["epochs"] + settings["schedule.cooldown_epochs"]
    reached = validations[-1]["epoch"] if validations else 0
    if reached < epochs:
        return Outcome(source=folder, note=f"epoch {reached} of {epochs}")
    if settings["data.name"] != recipe["data.name"]:
        return Outcome(source=folder, note=f"not comparable: data.name={settings['data.name']}")
    best = max(validations, key=lambda row: float(row["top1"]))
    differing = [
        f"{name}={settings.get(name)}"
        for name in sorted(settings.keys() | recipe.keys())
        if settings.get(name) != recipe.get(name) and not name.startswith(IGNORED_SETTINGS)
    ]
    notes = [f"not the recipe: {', '.join(differing)}"] if differing else []
    return Outcome(best["top1"], best["images"], folder, "; ".join(notes + _count_note(best["images"])))


def read_released(row: Row, results_csv: Path, crop_pct: float, interpolation: str) -> Outcome:
    """Return the latest evaluation of a row's released weights from a results file of validate.py.

    Args:
        row: the row.
        results_csv: the results file; it need not exist.
        crop_pct: the crop that the weights expect; another one is noted.
        interpolation: the resize filter that the weights expect; another one is noted.
    """
    if row.released_weights is None:
        return Outcome(note="no weights of this training in timm" if row.is_comparison else "no released weights")
    if not results_csv.is_file():
        return Outcome()
    try:
        with results_csv.open(newline="") as file:
            rows = [
                line
                for line in csv.DictReader(file)
                if line["checkpoint"] == row.released_weights and line["data"] == "imagenet"
            ]
        if not rows:
            return Outcome()
        last = rows[-1]
        found = {
            "model": last["model"],
            "img_size": int(last["img_size"]),
            "crop_pct": float(last["crop_pct"]),
            "interpolation": last["interpolation"],
        }
        values = (row.model, row.image_size, crop_pct, interpolation)
        expected = dict(zip(found, values, strict=True))
        notes = [f"{name}={value}, not {expected[name]}" for name, value in found.items() if value != expected[name]]
        images = int(last["images"])
        return Outcome(float(last["top1"]), images, results_csv, "; ".join(notes + _count_note(images)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{results_csv}: not a results file of validate.py ({error})") from error


def _count_note(images: int) -> list[str]:
    return [] if images == VALIDATION_IMAGES else [f"{images:,} images, not {VALIDATION_IMAGES:,}"]
