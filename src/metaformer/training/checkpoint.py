"""Checkpoints: folders that appear complete or not at all, and are used only if every byte is as it was written.

RUN/checkpoints/
    epoch-003/            after the third epoch: model.safetensors, ema.safetensors, trainer.pt, manifest.json
    step-00001500/        in the middle of an epoch
    last, best            pointers to two of them (`pointers`)
"""

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.files import fsync
from metaformer.training.config import CheckpointConfig
from metaformer.training.manifest import MANIFEST_FILE, read_manifest, verify, write_manifest
from metaformer.training.pointers import BEST, LAST, NAME, follow, read_pointer, write_pointer
from metaformer.training.probe import check_room, try_out
from metaformer.training.state import Snapshot, TrainState

# Entries of the identity that earlier versions did not write, with the only value that they had.
_OF_EARLIER_VERSIONS: dict[str, Any] = {
    "data.balance": "none",
    "augmentation.repeats": 1,
    "loader.decode": "exact",
    "distill.teacher": None,
    "model.freeze": None,
    "layer-wise learning rates": False,
}

MODEL_FILE, EMA_FILE, TRAINER_FILE = "model.safetensors", "ema.safetensors", "trainer.pt"


class WeightFiles(NamedTuple):
    """Functions that write a state dict to a file, and load a file into a model."""

    save: Callable[[dict[str, Tensor], Path], None]
    load: Callable[[nn.Module, Path], None]


class ResumePoint(NamedTuple):
    """The checkpoint to resume from, if any, and a line about each newer checkpoint or pointer that is damaged."""

    folder: Path | None
    skipped: tuple[str, ...] = ()


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: RUN/checkpoints; created at the first save, RUN must exist.
        config: selects the checkpoints to keep.
        facts: additional entries of each manifest: the network's name, ranks, configuration.
        weight_files: functions that write and load weights.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, facts: dict[str, Any], weight_files: WeightFiles
    ) -> None:
        self._folder, self._config = folder, config
        self._facts, self._weight_files = facts, weight_files

    def probe(self, size: int) -> None:
        """Test every operation of a save in the run folder, before training starts.

        Args:
            size: size of a checkpoint in bytes. There must be space for two, or for one if the run already has some.
        """
        place = self._folder if self._folder.is_dir() else self._folder.parent
        try_out(place)
        check_room(place, 1 if self._folder.is_dir() and self._named() else 2, size)

    def find(self) -> ResumePoint:
        """Return the checkpoint that `last` names if it is complete, else the newest complete one."""
        skipped = []
        last = None
        try:
            last = read_pointer(self._folder / LAST)
        except UserError as error:
            skipped.append(f"{error}; it is replaced at the next save")
        for folder in self._candidates(last):
            try:
                verify(folder)
            except UserError as error:
                skipped.append(str(error))
                continue
            return ResumePoint(folder, tuple(skipped))
        if skipped:
            raise UserError(
                f"{self._folder}: no checkpoint is complete ({'; '.join(skipped)}); restore one from a copy, or give "
                "another run_dir to start again"
            )
        return ResumePoint(None)

    def aliases(self) -> dict[Path, list[str]]:
        """Return the last and the best checkpoint, each with its aliases: "latest", "best" or both."""
        names: dict[Path, list[str]] = {}
        for pointer, alias in ((LAST, "latest"), (BEST, "best")):
            try:
                checkpoint = read_pointer(self._folder / pointer)
            except UserError:  # damaged: reported at the start, replaced by the next save
                continue
            if checkpoint is not None and checkpoint.exists():
                names.setdefault(checkpoint.absolute(), []).append(alias)
        return names

    def save(self, snapshot: Snapshot, name: str, is_best: bool) -> Path:
        """Write a checkpoint, point `last` (and `best`) at it, and then remove checkpoints that are no longer kept.

        Raises:
            OSError: the checkpoint cannot be written; earlier checkpoints are unchanged.
        """
        target, temporary = self._folder / name, self._folder / f".{name}.tmp"
        replaced = self._folder / f".{name}.old.tmp"
        self._folder.mkdir(exist_ok=True)
        for left_over in self._folder.glob(".*.tmp"):  # left by a run that was killed
            _remove(left_over)
        try:
            temporary.mkdir()
            self._write(snapshot, temporary)
            if target.exists():  # a step was repeated from an older checkpoint
                target.rename(replaced)
            temporary.rename(target)
            fsync(self._folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
        _remove(replaced)
        if is_best:  # written first: a run that is killed here repeats this epoch
            write_pointer(self._folder / BEST, name)
        write_pointer(self._folder / LAST, name)
        self._remove_old()
        return target

    def load(self, state: TrainState, folder: Path) -> None:
        """Restore the state from a checkpoint that `find` or `verify` found complete on one rank."""
        manifest = read_manifest(folder)
        for name, value in state.identity.items():
            saved = manifest["identity"].get(name, _OF_EARLIER_VERSIONS.get(name, value))
            if saved != value:
                raise UserError(
                    f"{folder}: cannot resume: it was trained with {name}={saved}, this run has {value}; "
                    "give the same value, or another run_dir"
                )
        averaged = EMA_FILE in manifest["files"]
        if averaged != (state.ema is not None):
            has, fix = ("an", "ema=enabled") if averaged else ("no", "ema=disabled")
            raise UserError(
                f"{folder}: cannot resume: it has {has} average of the weights; give {fix}, or start another run "
                f"with init_weights={folder} and another run_dir"
            )
        self._weight_files.load(state.model, folder / MODEL_FILE)
        if state.ema is not None:
            self._weight_files.load(state.ema.module, folder / EMA_FILE)
        try:
            trainer: dict[str, Any] = torch.load(folder / TRAINER_FILE, map_location="cpu", weights_only=True)
            state.load_trainer_state_dict(trainer)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{folder / TRAINER_FILE}: missing, damaged, or saved by another optimizer ({reason})"
            ) from error

    def _candidates(self, last: Path | None) -> Iterator[Path]:
        """Yield the checkpoint that `last` names, then all others, newest first."""
        if last is not None:
            yield last
        yield from (folder for folder in self._newest_first() if folder != last)

    def _write(self, snapshot: Snapshot, folder: Path) -> None:
        self._weight_files.save(snapshot.weights, folder / MODEL_FILE)
        if snapshot.ema is not None:
            self._weight_files.save(snapshot.ema, folder / EMA_FILE)
        try:
            torch.save(snapshot.trainer, folder / TRAINER_FILE)
        except RuntimeError as error:  # torch raises this on a full disk
            raise OSError(f"{str(error).splitlines()[0]}; is the disk full?") from error
        for file in folder.iterdir():
            fsync(file)
        facts = {**self._facts, "identity": snapshot.identity, "progress": snapshot.progress}
        write_manifest(folder, {**facts, "attempt": self._attempt(snapshot.progress)})
        fsync(folder / MANIFEST_FILE)
        fsync(folder)

    def _attempt(self, progress: dict[str, Any]) -> int:
        """Return the attempt of a new checkpoint: that of the newest one, plus 1 if training went back to before it."""
        for newest in self._newest_first():
            order = _order(newest)
            return max(0, order.attempt + (_position(progress) < (order.epochs, order.step)))
        return 0

    def _named(self) -> list[Path]:
        """Return all checkpoints; a folder is given such a name only when it is complete."""
        return [f for f in self._folder.glob("*-*") if NAME.fullmatch(f.name) and f.is_dir()]

    def _newest_first(self) -> list[Path]:
        return sorted(self._named(), key=_order, reverse=True)

    def _remove_old(self) -> None:
        kept = self.aliases()
        for folder in self._newest_first()[self._config.keep :]:
            if folder.absolute() not in kept and not self._is_kept_forever(folder):
                _discard(folder)

    def _is_kept_forever(self, folder: Path) -> bool:
        every, match = self._config.keep_every_epochs, NAME.fullmatch(folder.name)
        return every is not None and match is not None and match[1] is not None and int(match[1]) % every == 0


def _discard(checkpoint: Path) -> None:
    """Rename a checkpoint, then remove it, so that a partially removed one is not taken for a checkpoint."""
    gone = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    _remove(gone)
    checkpoint.rename(gone)
    _remove(gone)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


class _Order(NamedTuple):
    """Sort key: attempt, then progress. A new attempt begins when training goes back to an older checkpoint."""

    attempt: int
    epochs: int
    step: int
    saved_at: float  # used only for equal progress, because a clock may be set back


def _order(checkpoint: Path) -> _Order:
    """Return the sort key of a checkpoint; one without a readable manifest comes before all others."""
    try:
        manifest = read_manifest(checkpoint)
        attempt = manifest.get("attempt", 0)  # earlier versions wrote no attempt
        return _Order(int(attempt), *_position(manifest["progress"]), float(manifest["saved_at"]))
    except (UserError, KeyError, TypeError, ValueError):
        return _Order(-1, 0, 0, 0.0)


def _position(progress: dict[str, Any]) -> tuple[int, int]:
    return int(progress["epochs_completed"]), int(progress["step"])


def find_weights(field: str, checkpoint: Path, use_ema: bool) -> Path:
    """Return the weights file of a path: the file itself, or that of a checkpoint, or of a run folder's best.

    Args:
        field: the command-line field that contains the path, for error messages.
    """
    given, checkpoint = checkpoint, follow(checkpoint)
    if checkpoint.is_file():
        return checkpoint
    name = EMA_FILE if use_ema else MODEL_FILE
    for folder in (checkpoint, *(follow(checkpoint / "checkpoints" / pointer) for pointer in (BEST, LAST))):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{field}={given}: no file, and no checkpoint or run folder with {name}")
