"""What run folders and results files say about the paper's rows. A row that has no result has no number here."""

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
from metaformer.reporting.paper import PAPER_IMAGE_SIZE, Row

VALIDATION_IMAGES = 50_000  # of ImageNet-1K
# Settings that a recipe leaves to the machine and to taste; any other value than the recipe's is said in the table.
FREE = (
    "run_dir", "data.root", "data.source", "seed", "workers", "loader.", "tracking.", "checkpoint.", "guards.",
    "resume", "eval_batch_size", "accumulation_steps", "channels_last", "compile", "log_every_steps", "max_steps",
)  # fmt: skip
Settings = dict[str, Any]  # dotted names to values
# What a damaged file of a run folder raises.
_DAMAGE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError, YAMLError,
    OmegaConfBaseException,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What was found for a row.

    Attributes:
        top1: percent; None where there is no result to compare.
        images: validation images counted.
        source: the run folder, or the results file.
        note: why there is no number, or what to know about it; may be empty.
    """

    top1: float | None = None
    images: int | None = None
    source: Path | None = None
    note: str = "not run"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested settings by their dotted names."""
    flat: Settings = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def read_run(folder: Path, recipe: Mapping[str, Any]) -> Outcome:
    """The best validation of a run that has all its epochs.

    Args:
        folder: a run folder; it need not exist.
        recipe: the row's configuration, nested.

    """
    if not (folder / "config.yaml").is_file():
        return Outcome()
    try:
        return _read_run(folder, flatten(recipe))
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Outcome(source=folder, note=f"damaged: {reason}")


def _read_run(folder: Path, wanted: Settings) -> Outcome:
    settings: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    validations = [line for line in lines if line["kind"] == "validation"]
    ran = flatten(settings)
    epochs = ran["epochs"] + ran["schedule.cooldown_epochs"]
    reached = validations[-1]["epoch"] if validations else 0
    if reached < epochs:
        return Outcome(source=folder, note=f"epoch {reached} of {epochs}")
    if ran["data.name"] != wanted["data.name"]:
        return Outcome(source=folder, note=f"not comparable: data.name={ran['data.name']}")
    best = max(validations, key=lambda row: float(row["top1"]))
    differing = [
        f"{name}={ran.get(name)}"
        for name in sorted(ran.keys() | wanted.keys())
        if ran.get(name) != wanted.get(name) and not name.startswith(FREE)
    ]
    notes = [f"not the recipe: {', '.join(differing)}"] if differing else []
    return Outcome(best["top1"], best["images"], folder, "; ".join(notes + _count_note(best["images"])))


def read_released(row: Row, results_csv: Path, crop_pct: float, interpolation: str) -> Outcome:
    """The newest evaluation of a row's released weights in a file that validate.py wrote.

    Args:
        crop_pct, interpolation: what the weights expect.

    Raises:
        UserError: the file has not validate.py's columns.
    """
    if row.released is None:
        return Outcome(note="no released weights" if row.trained else "no weights of this training in timm")
    if not results_csv.is_file():
        return Outcome()
    try:
        with results_csv.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["checkpoint"] == row.released and r["data"] == "imagenet"]
        if not rows:
            return Outcome()
        last = rows[-1]
        found = {
            "model": last["model"],
            "img_size": int(last["img_size"]),
            "crop_pct": float(last["crop_pct"]),
            "interpolation": last["interpolation"],
        }
        expected = (row.model, PAPER_IMAGE_SIZE, crop_pct, interpolation)
        wanted = dict(zip(found, expected, strict=True))
        notes = [f"{name}={value}, not {wanted[name]}" for name, value in found.items() if value != wanted[name]]
        images = int(last["images"])
        return Outcome(float(last["top1"]), images, results_csv, "; ".join(notes + _count_note(images)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{results_csv}: not a results file of validate.py ({error})") from error


def _count_note(images: int) -> list[str]:
    return [] if images == VALIDATION_IMAGES else [f"{images:,} images, not {VALIDATION_IMAGES:,}"]
