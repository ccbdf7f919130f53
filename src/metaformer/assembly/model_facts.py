"""Collects facts about weights from the files of their run, for the model card."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaformer.assembly.parts import LocatedWeights
from metaformer.files import sha256
from metaformer.models.download import is_weights_name
from metaformer.models.export.model_card import Accuracy, Facts
from metaformer.reporting.run_record import RunRecord, is_number, read_record
from metaformer.training.checkpoint import EMA_FILE
from metaformer.training.manifest import MANIFEST_FILE, read_manifest

# Settings that make up a recipe: single fields, and groups with all their fields.
FIELDS = (
    "epochs", "global_batch_size", "clip_grad_norm", "seed", "init_weights", "init_head", "model.drop_path_rate",
    "model.freeze", "data.balance",
)  # fmt: skip
GROUPS = ("optimizer.", "schedule.", "augmentation.", "loss.", "distill.", "ema.", "precision.")
_PATHS = ("init_weights", "distill.teacher")


def collect_facts(weights: LocatedWeights, run: Path | None, licence: str | None) -> Facts:
    """Return the known facts about weights.

    Args:
        run: the run folder that the weights belong to, if any.
        licence: the licence that the user gave.
    """
    if run is None:
        return Facts(licence=licence)
    record = read_record(run)
    root = record.settings.get("data.root")
    return Facts(
        accuracy=_accuracy(weights.path),
        data=Path(root).absolute().name if isinstance(root, str) else None,
        recipe=dict(_recipe(record)),
        software=_software(record),
        commit=_commit(record),
        licence=licence,
    )


def _accuracy(weights: Path) -> Accuracy | None:
    """Return the accuracy of exactly these weights that was measured when the checkpoint was written."""
    if not (weights.parent / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(weights.parent)
    progress, row = manifest["progress"], manifest["progress"].get("last_validation") or {}
    written = manifest["files"].get(weights.name, {}).get("sha256")
    if row.get("step") != progress["step"] or written != sha256(weights):
        return None
    averaged = weights.name == EMA_FILE
    top1, top5 = (row.get(f"{'ema_' if averaged else ''}{name}") for name in ("top1", "top5"))
    if top1 is None or top5 is None or not (is_number(top1) and is_number(top5)):
        return None
    return Accuracy(top1, top5, row["images"], row["epoch"], averaged)


def _recipe(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield the settings of the recipe that are not null, without folders of this machine."""
    for name, value in record.settings.items():
        unused = name.startswith("distill.") and record.settings.get("distill.teacher") is None
        if value is None or unused or not (name in FIELDS or name.startswith(GROUPS)):
            continue
        if name in _PATHS and not is_weights_name(str(value)):
            value = Path(str(value)).name
        yield name, value


def _software(record: RunRecord) -> str | None:
    environment = record.environment
    packages, devices = environment.get("packages"), environment.get("devices")
    if not isinstance(packages, dict):
        return None
    names = [f"{name} {packages[name]}" for name in ("torch", "timm") if packages.get(name)]
    devices = sorted({device for device in devices if device}) if isinstance(devices, list) else []
    ranks = [f"{record.ranks} ranks"] if record.ranks else []
    return ", ".join([*names, *devices, *ranks]) or None


def _commit(record: RunRecord) -> str | None:
    git = record.environment.get("git")
    if not isinstance(git, dict) or not git.get("commit"):
        return None
    return f"{git['commit']}{', with changes that are not committed' if git.get('diff') else ''}"
