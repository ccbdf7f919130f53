"""Weights of networks: files with timm's keys out, those and the paper's program's in."""

import math
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Size, Tensor, nn

from metaformer.errors import UserError, printable
from metaformer.models.download import download_weights, is_weights_name
from metaformer.models.metaformer import MetaFormer
from metaformer.models.weight_formats import StateDict, is_official, official_to_metaformer
from metaformer.models.weight_reader import read_weights

# Tensors whose shape depends on the image's size.
POSITION_KEY = re.compile(r"stages\.\d+\.(position_embedding|blocks\.\d+\.token_mixer\.\w+(\.weight)?)")


def save_weights(model: nn.Module, path: Path, name: str) -> None:
    """Write a model's state dict; `name` is the network's, for error messages later.

    Raises:
        OSError: the file cannot be written.
    """
    save_state(model.state_dict(), path, name)


def save_state(state: StateDict, path: Path, name: str) -> None:
    """Write a state dict as safetensors.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    path.touch()
    permissions = path.stat().st_mode  # as the user's umask has them: safetensors lets nobody else read
    try:
        save_file(tensors, path, metadata={"format": "pt", "model": name})
        path.chmod(permissions)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from error


def load_weights(model: nn.Module, source: Path | str, use_ema: bool = False) -> None:
    """Load weights into a model; every key and shape must fit.

    Args:
        model: a network of this project, into which files of the paper's program go too, or any other network whose
            keys are the file's.
        source: a file that `read_weights` reads, or a name that `download_weights` knows.
        use_ema: take the averaged weights of a training checkpoint.

    Raises:
        UserError: the file is missing, damaged, refused, or of another network; the model is then as it was.
    """
    path = download_weights(str(source)) if is_weights_name(str(source)) else Path(source)
    state, name = read_weights(path, use_ema)
    if isinstance(model, MetaFormer) and is_official(state):
        try:
            state = official_to_metaformer(state)
        except ValueError as error:
            raise UserError(f"{path}: {printable(str(error), 500)}") from error
    misfit = _describe_misfit(model.state_dict(), state, name)
    if misfit:
        raise UserError(f"{path}: {printable(misfit, 500)}")
    model.load_state_dict(state)


def _describe_misfit(expected: StateDict, found: StateDict, name: str) -> str:
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    shapes = {
        key: (found[key].shape, expected[key].shape)
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    }
    types = [
        f"{key} is {_dtype(found[key])}, not {_dtype(expected[key])}"
        for key in expected
        if key in found and expected[key].is_floating_point() and not found[key].is_floating_point()
    ]
    mend = "" if missing or extra or types else _same_network(shapes)
    if mend:
        return mend
    parts = [f"missing {_some(missing)}"] if missing else []
    parts += [f"unexpected {_some(extra)}"] if extra else []
    if shapes:
        parts.append(_some([f"{key} is {list(file)}, not {list(model)}" for key, (file, model) in shapes.items()]))
    parts += [_some(types)] if types else []
    return (
        f"holds the weights of {name}, which do not fit this model: {', '.join(parts)}; check model=" if parts else ""
    )


def _some(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _same_network(shapes: dict[str, tuple[Size, Size]]) -> str:
    """What to change where only the number of classes or the size of the images differ; empty where more does."""
    sizes = {key: (file, model) for key, (file, model) in shapes.items() if len(file) == len(model)}
    classes = [key for key, (file, model) in sizes.items() if file[1:] == model[1:]]
    positions = [key for key in sizes if key not in classes and POSITION_KEY.fullmatch(key)]
    if len(classes) + len(positions) < len(shapes) or len({key.rpartition(".")[0] for key in classes}) > 1:
        return ""
    parts = []
    if classes:
        file, model = shapes[classes[0]]
        parts.append(f"has {file[0]} classes ({classes[0]}), this model {model[0]}; num_classes={file[0]}")
    if positions:
        in_file, in_model = (_pixels(positions[0], shape) for shape in shapes[positions[0]])
        parts.append(
            f"is for images of {in_file} pixels ({positions[0]}), this model for {in_model}; image_size={in_file}"
        )
    return ", and ".join(parts)


def _pixels(key: str, shape: Size) -> int:
    """The side of the images that a position embedding [1, C, H, W] or a matrix over positions [N, N] belongs to."""
    side: int = shape[-1] if len(shape) == 4 else math.isqrt(shape[0])
    return side << 2 + int(key.split(".")[1])  # the stem reduces 4-fold, each later stage 2-fold
