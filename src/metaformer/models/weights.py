"""Saves weights with timm's keys, and loads weights with timm's or the papers' keys."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Size, Tensor, nn

from metaformer.errors import UserError, printable
from metaformer.models.download import download_weights, is_weights_name
from metaformer.models.metaformer import MetaFormer
from metaformer.models.position_embeddings import TIMM_KEY
from metaformer.models.record import ENTRY, NAME_ENTRY, Record
from metaformer.models.weight_formats import StateDict, is_official, official_to_metaformer
from metaformer.models.weight_reader import read_weights

Convert = Callable[[StateDict], StateDict]
# Tensors whose shape depends on the image size.
POSITION_KEY = re.compile(r"stages\.\d+\.(position_embedding|blocks\.\d+\.token_mixer\.\w+(\.weight)?)")


def save_weights(model: nn.Module, path: Path, network: Record | str) -> None:
    """Write a model's state dict as `save_state` does.

    Raises:
        OSError: the file cannot be written.
    """
    save_state(model.state_dict(), path, network)


def save_state(state: StateDict, path: Path, network: Record | str) -> None:
    """Write a state dict as safetensors.

    Args:
        state: the tensors.
        path: the file to write.
        network: the record of the network, from which it can be created again, or only its name, for error messages.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    path.touch()
    permissions = path.stat().st_mode  # permissions by umask: safetensors makes files that only the user can read
    try:
        if isinstance(network, Record):
            recorded = {NAME_ENTRY: network.name, ENTRY: network.to_json()}
        else:
            recorded = {NAME_ENTRY: network}
        save_file(tensors, path, metadata={"format": "pt", **recorded})
        path.chmod(permissions)
    except SafetensorError as error:  # safetensors raises this on a full disk
        raise OSError(str(error)) from error


def load_weights(
    model: nn.Module,
    source: Path | str,
    use_ema: bool = False,
    convert: Convert | None = None,
) -> None:
    """Load weights into a model; every key and shape must match.

    The model is unchanged if the file does not match.

    Args:
        model: a network of this project, which also accepts files with the papers' keys, or any other network with the
            same keys as the file.
        source: a file for `read_weights`, or a name for `download_weights`.
        use_ema: take the averaged weights of a training checkpoint.
        convert: changes the state dict, with this project's keys, before it is compared with the model's.
    """
    path = download_weights(str(source)) if is_weights_name(str(source)) else Path(source)
    state, name = read_weights(path, use_ema)
    if isinstance(model, MetaFormer) and is_official(state):
        try:
            state = official_to_metaformer(state)
        except ValueError as error:
            raise UserError(f"{path}: {printable(str(error), 500)}") from error
    state = state if convert is None else convert(state)
    mismatch = _describe_mismatch(model.state_dict(), state, name)
    if mismatch:
        raise UserError(f"{path}: {printable(mismatch, 500)}")
    model.load_state_dict(state)


def _describe_mismatch(expected: StateDict, found: StateDict, name: str) -> str:
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    shapes = {
        key: (found[key].shape, expected[key].shape)
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    }
    types = [
        f"{key} is {_dtype_name(found[key])}, not {_dtype_name(expected[key])}"
        for key in expected
        if key in found and expected[key].is_floating_point() and not found[key].is_floating_point()
    ]
    setting = "" if missing or extra or types else _describe_setting(shapes)
    if setting:
        return setting
    parts = [f"missing {_summarize(missing)}"] if missing else []
    parts += [f"unexpected {_summarize(extra)}"] if extra else []
    if shapes:
        parts.append(_describe_shapes(shapes))
    parts += [_summarize(types)] if types else []
    return f"contains weights of {name}, which do not fit this model: {', '.join(parts)}; check model=" if parts else ""


def _summarize(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _describe_shapes(shapes: dict[str, tuple[Size, Size]]) -> str:
    return _summarize([f"{key} is {list(file)}, not {list(model)}" for key, (file, model) in shapes.items()])


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe_setting(shapes: dict[str, tuple[Size, Size]]) -> str:
    """Name the setting to change where only the number of classes or the image size differ; otherwise return ""."""
    if shapes and all(TIMM_KEY.search(key) for key in shapes):
        return f"is for images of another size ({_describe_shapes(shapes)}); set image_size to that of the weights"
    sizes = {key: (file, model) for key, (file, model) in shapes.items() if len(file) == len(model)}
    classes = [key for key, (file, model) in sizes.items() if file[1:] == model[1:]]
    positions = [key for key in sizes if key not in classes and POSITION_KEY.fullmatch(key)]
    if len(classes) + len(positions) < len(shapes) or len({key.rpartition(".")[0] for key in classes}) > 1:
        return ""
    parts = []
    if classes:
        file, model = shapes[classes[0]]
        parts.append(f"has {file[0]} classes ({classes[0]}), but this model has {model[0]}; set num_classes={file[0]}")
    if positions:
        in_file, in_model = (_image_side(positions[0], shape) for shape in shapes[positions[0]])
        parts.append(
            f"is for images of {in_file} pixels ({positions[0]}), but this model is for {in_model}; "
            f"set image_size={in_file}"
        )
    return ", and ".join(parts)


def _image_side(key: str, shape: Size) -> int:
    """Return the side in pixels of the images that fit a position embedding [1, C, H, W] or position matrix [N, N]."""
    side: int = shape[-1] if len(shape) == 4 else math.isqrt(shape[0])
    return side << 2 + int(key.split(".")[1])  # the stem reduces 4-fold, each later stage 2-fold
