"""Checkpoints: folders that appear whole or not at all.

RUN/checkpoints/
    epoch-003/            after the third epoch: model.safetensors, ema.safetensors, trainer.pt, manifest.json
    step-00001500/        in the middle of an epoch
    last, best            links to two of them
"""

import json
import pickle
import re
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


NAME = re.compile(r"epoch-\d+|step-\d+")


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
        """The newest checkpoint, if there is any.

        Raises:
            UserError: there was one, and it is gone.
        """
        link = self._folder / "last"
        if link.exists():
            return link.resolve()
        newest = max(self._complete(), key=_steps, default=None)  # the run died before its first link was made
        if newest is None and link.is_symlink():
            name = link.readlink()
            raise UserError(f"{link}: {name} is missing; rename .{name}.old.tmp to it if there, or remove the link")
        return newest

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
        target, temporary = self._folder / name, self._folder / f".{name}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left_over in self._folder.glob(".*.tmp"):  # of a run that was killed
                _remove(left_over)
            temporary.mkdir()
            self._write(state, temporary)
            replaced = self._folder / f".{name}.old.tmp"
            if target.exists():  # work was done again from an older checkpoint
                target.rename(replaced)
            temporary.rename(target)
            fsync(self._folder)
            _remove(replaced)
            if is_best:  # first: a run killed here does this epoch again
                self._point("best", target)
            self._point("last", target)
            self._remove_old()
        except OSError as error:
            _remove(temporary)
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
            state.load_state_dict(trainer)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{folder / TRAINER_FILE}: missing, damaged or of another optimizer ({reason})") from error

    def _write(self, state: TrainState, folder: Path) -> None:
        self._weight_files.save(state.model, folder / MODEL_FILE)
        if state.ema is not None:
            self._weight_files.save(state.ema.module, folder / EMA_FILE)
        trainer = state.state_dict()
        try:
            torch.save(trainer, folder / TRAINER_FILE)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        manifest = {"model": self._model_name, "identity": state.identity, "files": files}
        manifest["progress"] = trainer["progress"]
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
        """All checkpoints: a folder was renamed to such a name when it was whole."""
        return [f for f in self._folder.glob("*-*") if NAME.fullmatch(f.name) and (f / MANIFEST_FILE).is_file()]

    def _remove_old(self) -> None:
        pointed = self.pointed()
        for folder in sorted(self._complete(), key=_steps, reverse=True)[self._keep :]:
            if folder.resolve() not in pointed:
                _discard(folder)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is half removed no longer has a checkpoint's name."""
    gone = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    _remove(gone)
    checkpoint.rename(gone)
    _remove(gone)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _steps(checkpoint: Path) -> int:
    return int(_read_manifest(checkpoint)["progress"]["step"])


def find_weights(field: str, checkpoint: Path, use_ema: bool) -> Path:
    """The weights file that a path means: itself, or that of a checkpoint folder, or of a run folder's best.

    Args:
        field: what the user gave it as, for the error.

    Raises:
        UserError: there is none.
    """
    if checkpoint.is_file():
        return checkpoint
    name = EMA_FILE if use_ema else MODEL_FILE
    for folder in (checkpoint, checkpoint / "checkpoints" / "best", checkpoint / "checkpoints" / "last"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{field}={checkpoint}: no file, and no checkpoint or run folder with {name}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST_FILE}: damaged or missing ({error}); is this a checkpoint?") from error
    return manifest
