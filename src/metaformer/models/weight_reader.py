"""Reading weight files: safetensors, and torch's pickles without running what they name."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from metaformer.errors import UserError
from metaformer.models.weight_formats import StateDict, extract_state

# What torch files begin with that torch before 1.6 wrote; later ones are zip archives.
_OLD_TORCH_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_UNNAMED = "an unnamed network"


class Weights(NamedTuple):
    """A state dict, and whose it is as far as the file says."""

    state: StateDict
    name: str


def read_weights(path: Path, use_ema: bool = False) -> Weights:
    """Read a state dict, with the keys that it has, onto the CPU.

    The file's first bytes tell its format; its name does not matter. A torch file may hold a state dict or a training
    checkpoint of timm. Code that a torch file names is never run.

    Args:
        path: the file.
        use_ema: take the averaged weights of a training checkpoint of timm.

    Raises:
        UserError: the file is missing, damaged, refused, no weights file, or without averaged weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        with path.open("rb") as file:
            start = file.read(32)
            file.seek(0)
            if start[8:9] == b"{":
                return _read_safetensors(path, use_ema)
            if start.startswith(b"PK"):
                _check_archive(file)
            elif start.startswith(b"\x80") and not start.startswith(_OLD_TORCH_START):
                raise ValueError("a pickle, but not one that torch writes: refused, not executed")
            elif not start.startswith(b"\x80"):
                raise ValueError("not a weights file: neither safetensors nor torch's format")
            return _read_torch(file, use_ema)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _read_safetensors(path: Path, use_ema: bool) -> Weights:
    if use_ema:
        raise ValueError("use_ema=true: the file holds one set of weights; use_ema=false takes it")
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("model", _UNNAMED)
        return Weights(load_file(path), name)
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file ({error})") from error


def _check_archive(file: BinaryIO) -> None:
    """Refuse a zip archive that is cut short or holds no pickled tensors; leaves the file at its start."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {name.rpartition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"not a whole torch file ({error})") from error
    if "data.pkl" not in entries or "constants.pkl" in entries:  # the latter: TorchScript
        raise ValueError("not a weights file: a zip archive, but without a state dict of torch")
    file.seek(0)


def _read_torch(file: BinaryIO, use_ema: bool) -> Weights:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints keep their options in one
            # Not by the path: torch takes a name that ends with .safetensors for the format.
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage to a pickle can raise any
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"refused, and not executed: it would call {refused[1]}; only tensors and plain values are read"
            ) from error
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error) or type(error).__name__
        raise ValueError(f"not a whole torch file ({reason.strip().splitlines()[0]})") from error
    name = contents.get("arch") if isinstance(contents, dict) else None
    return Weights(extract_state(contents, use_ema), name if isinstance(name, str) else _UNNAMED)
