"""Readers of weight files: safetensors, and torch files without executing pickled code."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from metaformer.errors import UserError, printable
from metaformer.models.weight_formats import StateDict, extract_state

# Prefix of files from torch before 1.6; later versions write zip archives.
_LEGACY_TORCH_PREFIX = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_UNNAMED = "an unnamed network"
# Types of plain values that training programs save as options along with the weights.
_OPTION_TYPES = (
    "argparse.Namespace",
    *(f"pathlib.{path}" for path in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{path}" for path in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


class Weights(NamedTuple):
    """A state dict, and the network's name if the file has one."""

    state: StateDict
    name: str


def read_weights(path: Path, use_ema: bool = False) -> Weights:
    """Read a state dict onto the CPU, with its keys unchanged except for prefixes of torch's wrappers.

    The format is detected from the file's first bytes, not from its name. A torch file may contain a state dict or a
    training checkpoint of timm, torchvision's references or DeiT. Code that a torch file refers to is never executed.

    Args:
        path: the file.
        use_ema: take the averaged weights of a training checkpoint.
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
                check_archive(file)
                file.seek(0)
            elif start.startswith(b"\x80") and not start.startswith(_LEGACY_TORCH_PREFIX):
                raise ValueError("a pickle that torch did not write: refused, not executed")
            elif not start.startswith(b"\x80"):
                raise ValueError("not a weights file: neither safetensors nor torch's format")
            return _read_torch(file, use_ema)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {printable(str(error), 500)}") from error


def _read_safetensors(path: Path, use_ema: bool) -> Weights:
    if use_ema:
        raise ValueError("use_ema=true: the file contains only one set of weights; set use_ema=false to load it")
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("model", _UNNAMED)
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"incomplete or damaged safetensors file ({printable(str(error), 300)})") from error
    return Weights(extract_state(tensors, use_ema=False), printable(name, 100))


def check_archive(file: BinaryIO) -> None:
    """Check that a zip archive is complete, contains pickled tensors, and takes no more memory than disk space.

    Raises:
        ValueError: a check failed.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # a damaged directory can raise any exception
        raise ValueError(f"incomplete or damaged torch file ({error})") from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:  # the latter: TorchScript
        raise ValueError("not a weights file: a zip archive without a state dict of torch")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("a compressed zip archive, which torch does not write: load it with torch and save it again")
    if sum(entry.file_size for entry in entries) > file.seek(0, 2):  # entries that share their bytes
        raise ValueError("damaged torch file (its entries are larger than the file)")


class _Stub:
    """A placeholder for an object in a file's options, which neither runs its constructor nor keeps its state."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _read_torch(file: BinaryIO, use_ema: bool) -> Weights:
    try:
        with torch.serialization.safe_globals([(_Stub, name) for name in _OPTION_TYPES]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about kinds of tensors that are refused below
            # The file, not its path: torch would take a name that ends with .safetensors as the format.
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any exception
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"refused, and not executed: it would call {printable(refused[1], 100)}; only tensors and plain values "
                "are loaded; if you trust the file, load it with torch and save only its state dict"
            ) from error
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        line = next(iter(reason.strip().splitlines()), type(error).__name__)
        raise ValueError(f"incomplete or damaged torch file ({printable(line, 300)})") from error
    name = contents.get("arch") if isinstance(contents, dict) else None
    return Weights(extract_state(contents, use_ema), printable(name, 100) if isinstance(name, str) else _UNNAMED)
