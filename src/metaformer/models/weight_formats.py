"""State dicts of other programs: extraction from a file's contents, and conversion between the key layouts.

The first paper's program keeps everything between the stem and the last norm in one list, `network`. The blocks of a
stage, the downsampling before a stage and, in the attention hybrids, the position embedding before a stage take one
slot each. This project uses timm's keys, which name the stage. The stage follows from the order of the slots for every
network, so no table of networks is needed. `baseline_keys` has the second paper's layout.
"""

import re
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from metaformer.errors import printable
from metaformer.models import baseline_keys

StateDict = baseline_keys.StateDict

# Entries of training checkpoints: timm's, then those of torchvision's references and DeiT.
STATE_ENTRIES = ("state_dict", "model")
EMA_ENTRIES = ("state_dict_ema", "model_ema")
MAX_KEY_LENGTH = 200  # characters


class SlotKind(NamedTuple):
    """A kind of slot in `network`, with its key prefix after `network.SLOT.` and after this project's `stages.N.`."""

    letter: str
    official: str
    metaformer: str


DOWNSAMPLING = SlotKind("D", "proj.", "downsample.conv.")
POSITION_EMBEDDING = SlotKind("P", "pos_embed", "position_embedding")
BLOCKS = SlotKind("B", "", "blocks.")
SLOT_KINDS = (DOWNSAMPLING, POSITION_EMBEDDING, BLOCKS)  # in the order in which a stage applies them
SLOT_ORDER = re.compile("P?B(DP?B)*")

OUTSIDE_NETWORK = {"patch_embed.proj.": "stem.conv.", "norm.": "head.norm.", "head.": "head.fc."}
BLOCK_KEY = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)")
OTHER_KEY = re.compile(
    r"(stem\.conv|stages\.\d+\.downsample\.conv|head\.(norm|fc))\.\w+|stages\.\d+\.position_embedding"
)
LAYER_SCALES = {"layer_scale_1": "layer_scale1.scale", "layer_scale_2": "layer_scale2.scale"}


def extract_state(contents: object, use_ema: bool) -> StateDict:
    """Return the state dict in a file's contents, without the key prefixes of torch's wrappers.

    It is the whole contents or an entry of a training checkpoint: see STATE_ENTRIES and EMA_ENTRIES.

    Args:
        contents: the deserialized file.
        use_ema: take the averaged weights of a training checkpoint.

    Raises:
        ValueError: there is no state dict or more than one, a tensor is of a kind that networks do not have, or its
            name is too long or not printable.
    """
    if not isinstance(contents, Mapping):
        raise ValueError(f"contains no state dict, but an object of type {type(contents).__name__}")
    found = [name for name in (EMA_ENTRIES if use_ema else STATE_ENTRIES) if _is_state(contents.get(name))]
    if use_ema and not found:
        names = " or ".join(EMA_ENTRIES)
        raise ValueError(f"use_ema=true: no averaged weights ({names}) in the file; set use_ema=false for the others")
    if len(found) > 1:
        raise ValueError(f"contains several state dicts ({', '.join(found)}); save one of them in a separate file")
    state = contents[found[0]] if found else contents
    if not _is_state(state):
        entries = (printable(key, 40) if isinstance(key, str) else f"a {type(key).__name__}" for key in contents)
        raise ValueError(f"contains no state dict, but {', '.join(islice(entries, 5)) or 'nothing'}")
    _check_tensors(state)
    # Detach, which also drops attributes that a pickle may have set on a tensor.
    return unwrap({key: Tensor.detach(tensor) for key, tensor in state.items()})


def unwrap(state: StateDict) -> StateDict:
    """Strip the key prefixes of torch's wrappers, in any nesting.

    torch.compile adds `_orig_mod.`, in the middle of a key where only a part of the network is compiled.
    DistributedDataParallel and AveragedModel add `module.` to every key. AveragedModel also adds a counter,
    `n_averaged`.
    """
    stripped = {re.sub(r"(?<![^.])(_orig_mod\.)+", "", key): tensor for key, tensor in state.items()}
    if len(stripped) < len(state):  # two tensors would get the same key: loading reports them
        return state
    while True:
        wrapped = {key: tensor for key, tensor in stripped.items() if key != "n_averaged" or tensor.numel() != 1}
        if not wrapped or not all(key.startswith("module.") for key in wrapped):
            return stripped
        stripped = {key.removeprefix("module."): tensor for key, tensor in wrapped.items()}


def is_official(state: StateDict) -> bool:
    """Return whether the keys are those of one of the papers' programs."""
    return any(key.startswith("network.") for key in state) or baseline_keys.has_official_keys(state)


def official_to_metaformer(state: StateDict) -> StateDict:
    """Rename the keys of a paper's program to this project's keys; the tensors are not copied.

    Raises:
        ValueError: a key does not belong to that program's networks, or no network has this order of slots.
    """
    if baseline_keys.has_official_keys(state):
        return baseline_keys.official_to_metaformer(state)
    slots: dict[int, list[str]] = {}
    for key in state:
        if match := re.fullmatch(r"network\.(\d+)\.(.+)", key):
            slots.setdefault(int(match[1]), []).append(match[2])
    prefixes, stage, order = dict(OUTSIDE_NETWORK), 0, ""
    for slot in sorted(slots):
        kind = _slot_kind(slot, slots[slot])
        stage += kind is DOWNSAMPLING
        order += kind.letter
        prefixes[f"network.{slot}.{kind.official}"] = f"stages.{stage}.{kind.metaformer}"
    if sorted(slots) != list(range(len(slots))) or not SLOT_ORDER.fullmatch(order):
        raise ValueError(f"slots {sorted(slots)} of network ({order}) do not form a complete network")
    return _rename(state, prefixes, LAYER_SCALES)


def metaformer_to_official(state: StateDict) -> StateDict:
    """Rename this project's keys to those of the paper's program, the inverse of `official_to_metaformer`.

    Raises:
        ValueError: a key does not belong to this project's networks.
    """
    if baseline_keys.has_baseline_keys(state):
        return baseline_keys.metaformer_to_official(state)
    prefixes = {metaformer: official for official, metaformer in OUTSIDE_NETWORK.items()}
    stages = {int(match[1]) for key in state if (match := re.match(r"stages\.(\d+)\.", key))}
    slot = 0
    for stage in sorted(stages):
        for kind in SLOT_KINDS:
            prefix = f"stages.{stage}.{kind.metaformer}"
            if any(key.startswith(prefix) for key in state):
                prefixes[prefix] = f"network.{slot}.{kind.official}"
                slot += 1
    return _rename(state, prefixes, {metaformer: official for official, metaformer in LAYER_SCALES.items()})


def check_complete(state: StateDict) -> None:
    """Check by structure alone that a state dict is a complete network with this project's keys.

    It must have a stem, downsampling and a classifier. Stages and blocks must be numbered without gaps. The blocks of a
    stage must have the same tensors. Every layer except token mixers must have both weight and bias; in networks of the
    second paper, those that have biases there.

    Raises:
        ValueError: a key is missing or unknown, or its shape differs from the stage's other blocks.
    """
    baseline = baseline_keys.has_baseline_keys(state)
    shapes: dict[tuple[int, str], list[torch.Size]] = {}  # shapes of a tensor in the blocks of a stage
    depths: dict[int, int] = {}
    for key, tensor in state.items():
        if match := BLOCK_KEY.fullmatch(key):
            stage, block = int(match[1]), int(match[2])
            if max(stage, block) >= len(state):
                raise ValueError(f"{key}: stages or blocks before it are missing")
            shapes.setdefault((stage, match[3]), []).append(tensor.shape)
            depths[stage] = max(depths.get(stage, 0), block + 1)
        elif not baseline and not OTHER_KEY.fullmatch(key):
            raise ValueError(f"{key}: not a key of a known network")
    expected = baseline_keys.required_keys(state) if baseline else {"stem.conv.weight", "head.fc.weight"}
    for stage in range(max(depths, default=0) + 1):
        expected |= {f"stages.{stage}.downsample.conv.weight"} if stage else set()
        names = [name for other, name in shapes if other == stage] or ["mlp.fc1.weight"]
        expected |= {f"stages.{stage}.blocks.{block}.{name}" for block in range(depths.get(stage, 1)) for name in names}
    for key in [] if baseline else [*expected, *state]:
        if match := re.fullmatch(r"(.*)\.(weight|bias)", key):
            expected |= set() if ".token_mixer." in key else {f"{match[1]}.weight", f"{match[1]}.bias"}
    missing = sorted(expected - state.keys())
    if missing:
        raise ValueError(f"{missing[0]}: missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    for (stage, name), found in shapes.items():
        if len(set(found)) > 1:
            raise ValueError(f"stages.{stage}.blocks.*.{name}: has different shapes in one stage")


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot be copied into a network unchanged, and names that no message can show."""
    for key, tensor in state.items():
        if len(key) > MAX_KEY_LENGTH or not key.isprintable():
            raise ValueError(f"{printable(key, 100)}: not a valid tensor name: too long or not printable")
        kind = _unusual_kind(tensor)
        if kind is not None:
            raise ValueError(f"{key}: a {kind} tensor; replace it with a dense tensor of real numbers")


def _unusual_kind(tensor: Tensor) -> str | None:
    """Return the kind of a tensor that is not a dense tensor of real numbers on the CPU, otherwise None."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.device.type != "cpu":  # a meta tensor, which has no values: all others are read onto the CPU
        return tensor.device.type
    return "complex" if tensor.dtype.is_complex else None


def _slot_kind(slot: int, names: list[str]) -> SlotKind:
    if all(name.startswith(DOWNSAMPLING.official) for name in names):
        return DOWNSAMPLING
    if names == [POSITION_EMBEDDING.official]:
        return POSITION_EMBEDDING
    if all(re.match(r"\d+\.", name) for name in names):
        return BLOCKS
    raise ValueError(f"network.{slot}.{names[0]}: neither a block, downsampling nor a position embedding")


def _rename(state: StateDict, prefixes: Mapping[str, str], suffixes: Mapping[str, str]) -> StateDict:
    renamed = {}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{key}: not a key of a known network")
        rest = key.removeprefix(prefix)
        for old, new in suffixes.items():
            if rest.endswith(f".{old}"):
                rest = rest.removesuffix(old) + new
        renamed[prefixes[prefix] + rest] = tensor
    return renamed
