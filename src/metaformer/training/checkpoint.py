"""Checkpoints: folders that appear whole or not at all.

RUN/checkpoints/
    epoch-003/            after the third epoch: model.safetensors, ema.safetensors, trainer.pt, manifest.json
    step-00001500/        in the middle of an epoch
    last, best            links to two of them
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from metaformer.errors import UserError
from metaformer.files import fsync
from metaformer.training.state import TrainState

MODEL_FILE, EMA_FILE, TRAINER_FILE, MANIFEST_FILE = (
    "model.safetensors",
    "ema.safetensors",
    "trainer.pt",
    "manifest.json",
)


class WeightFiles(NamedTuple):
    """How a model's weights are written to a file, and read from it into a model."""

    save: Callable[[nn.Module, Path], None]
    load: Callable[[nn.Module, Path], None]


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep besides the best and the last."""

    every_epochs: int = 1
    every_steps: int | None = None  # also in the middle of epochs
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name}={value}: must be at least 1")


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: RUN/checkpoints; made at the first save.
        keep: how many to keep besides the best and the last.
        model_name: for the manifest.
        weight_files: how weights are written and read.
    """

    def __init__(self, folder: Path, keep: int, model_name: str, weight_files: WeightFiles) -> None:
        self._folder, self._keep = folder, keep
        self._model_name, self._weight_files = model_name, weight_files

    def last(self) -> Path | None:
        """The newest checkpoint, if there is any."""
        link = self._folder / "last"
        if link.exists():
            return link.resolve()
        return max(self._complete(), key=_steps, default=None)  # the run died before its first link was made

    def pointed(self) -> dict[Path, list[str]]:
        """The last and the best checkpoint, each with what it is: "latest", "best" or both."""
        names: dict[Path, list[str]] = {}
        for link, alias in (("last", "latest"), ("best", "best")):
            if (self._folder / link).exists():
                names.setdefault((self._folder / link).resolve(), []).append(alias)
        return names

    def save(self, state: TrainState, name: str, is_best: bool) -> Path:
        """Write one checkpoint, then point `last` (and `best`) at it, then remove those no longer kept.

        Raises:
            UserError: the disk refuses; earlier checkpoints are as they were.
        """
        target = self._folder / name
        temporary = self._folder / f".{name}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write(state, temporary)
            if target.exists():  # only after work was redone from an older checkpoint
                shutil.rmtree(target)
            temporary.rename(target)
            fsync(self._folder)
            self._point("last", target)
            if is_best:
                self._point("best", target)
            self._remove_old()
        except OSError as error:
            raise UserError(f"{target}: cannot write the checkpoint ({error.strerror or error})") from error
        return target

    def load(self, state: TrainState, folder: Path) -> None:
        """Restore training from a checkpoint.

        Raises:
            UserError: a file is missing or damaged, or it belongs to another network, data set or batch size.
        """
        manifest = _read_manifest(folder)
        for name, value in state.identity.items():
            saved = manifest["identity"].get(name)
            if saved != value:
                raise UserError(
                    f"{folder}: cannot resume: it was trained with {name}={saved}, this run has {value}; "
                    "give the same, or another run_dir"
                )
        self._weight_files.load(state.model, folder / MODEL_FILE)
        if state.ema is not None:
            self._weight_files.load(state.ema.module, folder / EMA_FILE)
        try:
            trainer: dict[str, Any] = torch.load(folder / TRAINER_FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder / TRAINER_FILE}: damaged or missing ({str(error).splitlines()[0]})") from error
        state.load_state_dict(trainer)

    def _write(self, state: TrainState, folder: Path) -> None:
        self._weight_files.save(state.model, folder / MODEL_FILE)
        if state.ema is not None:
            self._weight_files.save(state.ema.module, folder / EMA_FILE)
        torch.save(state.state_dict(), folder / TRAINER_FILE)
        progress = state.state_dict()["progress"]
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        manifest = {"model": self._model_name, "progress": progress, "identity": state.identity, "files": files}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in folder.iterdir():
            fsync(file)
        fsync(folder)

    def _point(self, name: str, target: Path) -> None:
        write_link = self._folder / f".{name}.tmp"
        write_link.unlink(missing_ok=True)
        write_link.symlink_to(target.name)
        write_link.replace(self._folder / name)
        fsync(self._folder)

    def _complete(self) -> list[Path]:
        """All checkpoints: a folder without a dot was renamed to its name when it was whole."""
        if not self._folder.is_dir():
            return []
        return [f for f in self._folder.iterdir() if f.is_dir() and not f.is_symlink() and f.name[0] != "."]

    def _remove_old(self) -> None:
        pointed = self.pointed()
        for folder in sorted(self._complete(), key=_steps, reverse=True)[self._keep :]:
            if folder.resolve() not in pointed:
                shutil.rmtree(folder)


def _steps(checkpoint: Path) -> int:
    return int(_read_manifest(checkpoint)["progress"]["step"])


def find_weights(checkpoint: Path, use_ema: bool) -> Path:
    """The weights file that a path means: itself, or that of a checkpoint folder, or of a run folder's best.

    Raises:
        UserError: there is none.
    """
    if checkpoint.is_file():
        return checkpoint
    name = EMA_FILE if use_ema else MODEL_FILE
    for folder in (checkpoint, checkpoint / "checkpoints" / "best", checkpoint / "checkpoints" / "last"):
        if (folder / name).is_file():
            return folder / name
    hint = "; the run kept no EMA: use_ema=false" if use_ema and find_weights(checkpoint, False) else ""
    raise UserError(f"checkpoint={checkpoint}: no file, checkpoint folder or run folder with {name}{hint}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST_FILE}: damaged or missing ({error}); is this a checkpoint?") from error
    return manifest
