"""State dicts of other programs: where they lie in a file's contents, and the two layouts of keys.

The paper's program keeps everything between the stem and the last norm in one list, `network`: the blocks of a stage,
the downsampling before a stage and, in the attention hybrids, the position embedding before a stage take a slot each.
This project's networks have timm's keys, where each belongs to its stage. The order of the slots tells which, for every
network: there is no table of networks.
"""

import re
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from metaformer.errors import printable

StateDict = dict[str, Tensor]

# Entries of training checkpoints: timm's, then those of torchvision's references and DeiT.
STATE_ENTRIES = ("state_dict", "model")
AVERAGE_ENTRIES = ("state_dict_ema", "model_ema")
LONGEST_KEY = 200  # characters


class SlotKind(NamedTuple):
    """What a slot of `network` may hold: how keys go on after `network.SLOT.`, and after this project's `stages.N.`."""

    letter: str
    official: str
    ours: str


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
    """Return the state dict in a file's contents, without what torch's wrappers add to its keys.

    It is all of the contents, or an entry of a training checkpoint: see STATE_ENTRIES and AVERAGE_ENTRIES.

    Args:
        contents: what was read.
        use_ema: take the averaged weights of a training checkpoint.

    Raises:
        ValueError: there is none, or several; a tensor is of a kind that no network's weights are, or its name is not
            printable.
    """
    if not isinstance(contents, Mapping):
        raise ValueError(f"holds no state dict, but an object of type {type(contents).__name__}")
    found = [name for name in (AVERAGE_ENTRIES if use_ema else STATE_ENTRIES) if _is_state(contents.get(name))]
    if use_ema and not found:
        names = " or ".join(AVERAGE_ENTRIES)
        raise ValueError(f"use_ema=true: there are no averaged weights ({names}); use_ema=false takes the others")
    if len(found) > 1:
        raise ValueError(f"holds several state dicts ({', '.join(found)}); save one of them in a file of its own")
    state = contents[found[0]] if found else contents
    if not _is_state(state):
        entries = (printable(key, 40) if isinstance(key, str) else f"a {type(key).__name__}" for key in contents)
        raise ValueError(f"holds no state dict, but {', '.join(islice(entries, 5)) or 'nothing'}")
    _check_tensors(state)
    # Detached: without gradients, and without attributes that a pickle may have given a tensor.
    return unwrap({key: Tensor.detach(tensor) for key, tensor in state.items()})


def unwrap(state: StateDict) -> StateDict:
    """Strip what torch's wrappers add to the keys, in any nesting.

    torch.compile adds `_orig_mod.`, also in the middle of a key where it compiled a part of the network;
    DistributedDataParallel and AveragedModel add `module.` to every key, and AveragedModel a counter, `n_averaged`.
    """
    stripped = {re.sub(r"(?<![^.])(_orig_mod\.)+", "", key): tensor for key, tensor in state.items()}
    if len(stripped) < len(state):  # two tensors of one name: loading names the keys
        return state
    while True:
        wrapped = {key: tensor for key, tensor in stripped.items() if key != "n_averaged" or tensor.numel() != 1}
        if not wrapped or not all(key.startswith("module.") for key in wrapped):
            return stripped
        stripped = {key.removeprefix("module."): tensor for key, tensor in wrapped.items()}


def is_official(state: StateDict) -> bool:
    """Whether the keys are those of the paper's program."""
    return any(key.startswith("network.") for key in state)


def official_to_metaformer(state: StateDict) -> StateDict:
    """Rename the keys of the paper's program to this project's; the tensors stay as they are.

    Raises:
        ValueError: a key is not of that program's networks, or the slots are in an order that no network has.
    """
    slots: dict[int, list[str]] = {}
    for key in state:
        if match := re.fullmatch(r"network\.(\d+)\.(.+)", key):
            slots.setdefault(int(match[1]), []).append(match[2])
    prefixes, stage, order = dict(OUTSIDE_NETWORK), 0, ""
    for slot in sorted(slots):
        kind = _slot_kind(slot, slots[slot])
        stage += kind is DOWNSAMPLING
        order += kind.letter
        prefixes[f"network.{slot}.{kind.official}"] = f"stages.{stage}.{kind.ours}"
    if sorted(slots) != list(range(len(slots))) or not SLOT_ORDER.fullmatch(order):
        raise ValueError(f"slots {sorted(slots)} of network ({order}) are not those of a whole network")
    return _rename(state, prefixes, LAYER_SCALES)


def metaformer_to_official(state: StateDict) -> StateDict:
    """The inverse of `official_to_metaformer`.

    Raises:
        ValueError: a key is not of this project's networks.
    """
    prefixes = {ours: official for official, ours in OUTSIDE_NETWORK.items()}
    stages = {int(match[1]) for key in state if (match := re.match(r"stages\.(\d+)\.", key))}
    slot = 0
    for stage in sorted(stages):
        for kind in SLOT_KINDS:
            ours = f"stages.{stage}.{kind.ours}"
            if any(key.startswith(ours) for key in state):
                prefixes[ours] = f"network.{slot}.{kind.official}"
                slot += 1
    return _rename(state, prefixes, {ours: official for official, ours in LAYER_SCALES.items()})


def check_whole(state: StateDict) -> None:
    """Refuse what is not a network in this project's keys, told by its structure alone.

    Stem, downsampling and classifier are there; stages and blocks are counted without gaps; the blocks of a stage have
    the same tensors; every layer but a token mixer has both weight and bias.

    Raises:
        ValueError: names a key that is missing, unknown, or of another shape than in the stage's other blocks.
    """
    shapes: dict[tuple[int, str], list[torch.Size]] = {}  # of a tensor in all blocks of a stage
    depths: dict[int, int] = {}
    for key, tensor in state.items():
        if match := BLOCK_KEY.fullmatch(key):
            stage, block = int(match[1]), int(match[2])
            if max(stage, block) >= len(state):
                raise ValueError(f"{key}: stages and blocks before it are missing")
            shapes.setdefault((stage, match[3]), []).append(tensor.shape)
            depths[stage] = max(depths.get(stage, 0), block + 1)
        elif not OTHER_KEY.fullmatch(key):
            raise ValueError(f"{key}: not of a network that this project knows")
    expected = {"stem.conv.weight", "head.fc.weight"}
    for stage in range(max(depths, default=0) + 1):
        expected |= {f"stages.{stage}.downsample.conv.weight"} if stage else set()
        rests = [rest for other, rest in shapes if other == stage] or ["mlp.fc1.weight"]
        expected |= {f"stages.{stage}.blocks.{block}.{rest}" for block in range(depths.get(stage, 1)) for rest in rests}
    for key in [*expected, *state]:
        if match := re.fullmatch(r"(.*)\.(weight|bias)", key):
            expected |= set() if ".token_mixer." in key else {f"{match[1]}.weight", f"{match[1]}.bias"}
    missing = sorted(expected - state.keys())
    if missing:
        raise ValueError(f"{missing[0]}: missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    for (stage, rest), found in shapes.items():
        if len(set(found)) > 1:
            raise ValueError(f"stages.{stage}.blocks.*.{rest}: of several shapes in one stage")


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """Refuse what could not be copied into a network as it is, and names that no message can show."""
    for key, tensor in state.items():
        if len(key) > LONGEST_KEY or not key.isprintable():
            raise ValueError(f"{printable(key, 100)}: not a tensor's name: too long, or not printable")
        kind = _unusual_kind(tensor)
        if kind is not None:
            raise ValueError(f"{key}: a {kind} tensor; save a dense tensor of real numbers in its place")


def _unusual_kind(tensor: Tensor) -> str | None:
    """What kind of tensor it is, where that is not the usual one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.device.type != "cpu":  # everything is read onto the CPU, but a meta tensor holds no values
        return tensor.device.type
    return "complex" if tensor.dtype.is_complex else None


def _slot_kind(slot: int, rests: list[str]) -> SlotKind:
    if all(rest.startswith(DOWNSAMPLING.official) for rest in rests):
        return DOWNSAMPLING
    if rests == [POSITION_EMBEDDING.official]:
        return POSITION_EMBEDDING
    if all(re.match(r"\d+\.", rest) for rest in rests):
        return BLOCKS
    raise ValueError(f"network.{slot}.{rests[0]}: neither blocks, nor downsampling, nor a position embedding")


def _rename(state: StateDict, prefixes: Mapping[str, str], suffixes: Mapping[str, str]) -> StateDict:
    renamed = {}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{key}: not of a network that this project knows")
        rest = key.removeprefix(prefix)
        for old, new in suffixes.items():
            if rest.endswith(f".{old}"):
                rest = rest.removesuffix(old) + new
        renamed[prefixes[prefix] + rest] = tensor
    return renamed
