"""Weight files: safetensors whose keys are timm's, with the network's name inside."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metaformer.errors import UserError


def save_weights(model: nn.Module, path: Path, name: str) -> None:
    """Write a model's state dict; `name` is the network's, for error messages later.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", "model": name})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from error


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a file that `save_weights` wrote; every key and shape must fit.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("model", "an unnamed network")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    difference = _describe_difference(model.state_dict(), tensors)
    if difference:
        raise UserError(f"{path}: holds the weights of {name}, which do not fit this model: {difference}; check model=")
    model.load_state_dict(tensors)


def _describe_difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    def some(keys: list[str]) -> str:
        return f"{keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")

    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    shapes = [
        f"{key} is {list(found[key].shape)}, not {list(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    parts = [f"missing {some(missing)}"] if missing else []
    parts += [f"unexpected {some(extra)}"] if extra else []
    parts += [some(shapes)] if shapes else []
    return ", ".join(parts)
