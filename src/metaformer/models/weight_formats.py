"""State dicts of other programs: where they lie in a file's contents, and the two layouts of keys.

The paper's program keeps everything between the stem and the last norm in one list, `network`: the blocks of a stage,
the downsampling before a stage and, in the attention hybrids, the position embedding before a stage take a slot each.
This project's networks have timm's keys, where each belongs to its stage. The order of the slots tells which, for every
network: there is no table of networks.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


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
    """The state dict in what a torch file holds: all of it, or an entry of timm's training checkpoint.

    Args:
        contents: what `torch.load` returned.
        use_ema: take `state_dict_ema`, which timm writes where it keeps an average.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(contents, Mapping):
        raise ValueError(f"holds no state dict, but an object of type {type(contents).__name__}")
    if use_ema and "state_dict_ema" not in contents:
        raise ValueError("use_ema=true: there are no averaged weights (state_dict_ema); use_ema=false takes the others")
    state = contents.get("state_dict_ema" if use_ema else "state_dict", contents)
    if not isinstance(state, Mapping) or not state or not all(map(_is_entry, state.items())):
        raise ValueError(f"holds no state dict, but {', '.join(map(str, list(contents)[:5])) or 'nothing'}")
    if all(key.startswith("module.") for key in state):  # DistributedDataParallel's
        return {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return dict(state)


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


def _is_entry(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


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
