"""State dicts of other programs: extraction, the two key layouts, and the check for completeness."""

import re
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from metaformer.models import MetaFormer
from metaformer.models.variants import VARIANTS
from metaformer.models.weight_formats import (
    StateDict,
    check_complete,
    extract_state,
    is_official,
    metaformer_to_official,
    official_to_metaformer,
    unwrap,
)
from tests.models.released import RELEASED_SLOTS, SMALL_DIMS, released_state


@pytest.mark.parametrize("name", VARIANTS)
def test_official_round_trip(name: str) -> None:
    """Each network's state dict is restored with the same keys and tensors, and is a complete network."""
    model = MetaFormer(replace(VARIANTS[name], dims=SMALL_DIMS), num_classes=3, image_size=64)
    state = dict(model.state_dict())
    official = metaformer_to_official(state)
    assert is_official(official)
    assert not is_official(state)
    back = official_to_metaformer(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    check_complete(state)


@pytest.mark.parametrize("name", RELEASED_SLOTS)
def test_round_trip_of_released_keys(name: str) -> None:
    """The released keys, written by hand, are restored from this project's keys."""
    state = released_state(name)
    back = metaformer_to_official(official_to_metaformer(state))
    assert back.keys() == state.keys()
    assert all(back[key] is tensor for key, tensor in state.items())


def test_more_than_ten_blocks() -> None:
    """Block numbers with two digits are converted correctly: block 17 stays block 17."""
    state = released_state("poolformer_s12", depths=(1, 1, 18, 1))
    converted = official_to_metaformer(state)
    assert converted["stages.2.blocks.17.mlp.fc1.weight"] is state["network.4.17.mlp.fc1.weight"]
    assert converted["stages.2.blocks.1.layer_scale2.scale"] is state["network.4.1.layer_scale_2"]


@pytest.mark.parametrize(
    ("name", "released", "ours"),
    [
        ("poolformer_s12", "network.6.0.norm1.bias", "stages.3.blocks.0.norm1.bias"),
        ("poolformer_s12", "network.5.proj.bias", "stages.3.downsample.conv.bias"),
        ("poolformer_s12", "patch_embed.proj.weight", "stem.conv.weight"),
        ("poolformer_s12", "norm.weight", "head.norm.weight"),
        ("poolformer_s12", "head.weight", "head.fc.weight"),
        ("metaformer_pppa_s12_224", "network.6.pos_embed", "stages.3.position_embedding"),
        ("metaformer_pppa_s12_224", "network.7.0.token_mixer.qkv.weight", "stages.3.blocks.0.token_mixer.qkv.weight"),
        ("metaformer_ppaa_s12_224", "network.4.pos_embed", "stages.2.position_embedding"),
        ("metaformer_ppaa_s12_224", "network.5.2.layer_scale_1", "stages.2.blocks.2.layer_scale1.scale"),
        ("metaformer_ppaa_s12_224", "network.6.proj.weight", "stages.3.downsample.conv.weight"),
        ("metaformer_ppff_s12_224", "network.6.0.token_mixer.fc.weight", "stages.3.blocks.0.token_mixer.fc.weight"),
    ],
)
def test_keys(name: str, released: str, ours: str) -> None:
    """Some released keys are converted to the expected keys of this project."""
    state = released_state(name)
    assert official_to_metaformer(state)[ours] is state[released]


@pytest.mark.parametrize(
    ("renamed", "part"),
    [
        ({"head.weight": "classifier.weight"}, "classifier.weight"),
        ({"network.1.proj.bias": "network.1.norm.bias"}, "network.1."),
        ({"network.1.proj.bias": "network.one.bias"}, "network.one.bias"),
    ],
)
def test_unknown_official_key(renamed: dict[str, str], part: str) -> None:
    """A key that no released network has is refused, not ignored."""
    state = {renamed.get(key, key): tensor for key, tensor in released_state("poolformer_s12").items()}
    with pytest.raises(ValueError, match=part):
        official_to_metaformer(state)


@pytest.mark.parametrize(
    "slots",
    [(1, 0, 2, 3, 4, 5, 6), (0, 1, 3, 2, 4, 5, 6), (0, 1, 2, 3, 4, 6, 7), (1, 2, 3, 4, 5, 6, 7)],
    ids=["downsampling first", "blocks twice", "gap", "none first"],
)
def test_unknown_order_of_slots(slots: tuple[int, ...]) -> None:
    """Slots with a gap or in an order that no network has are refused."""
    state = {
        re.sub(r"network\.(\d)", lambda match: f"network.{slots[int(match[1])]}", key): tensor
        for key, tensor in released_state("poolformer_s12").items()
    }
    with pytest.raises(ValueError, match=r"slots \[.*\] of network"):
        official_to_metaformer(state)


def test_unknown_key_of_this_project() -> None:
    """A key that no network of this project has is refused, not ignored."""
    state = official_to_metaformer(released_state("poolformer_s12"))
    for key in ("stages.0.extra.weight", "fc.weight"):
        with pytest.raises(ValueError, match=key):
            metaformer_to_official(state | {key: torch.zeros(1)})


@pytest.mark.parametrize(
    "key",
    [
        "stem.conv.weight",
        "stem.conv.bias",
        "stages.2.downsample.conv.weight",
        "stages.2.blocks.1.norm1.bias",
        "stages.2.blocks.0.token_mixer.qkv.weight",
        "stages.0.blocks.0.mlp.fc1.bias",
        "stages.2.blocks.2.layer_scale1.scale",
        "head.norm.bias",
        "head.fc.weight",
    ],
)
def test_incomplete_network(key: str) -> None:
    """A network without one of its tensors is refused."""
    state = official_to_metaformer(released_state("metaformer_ppaa_s12_224"))
    check_complete(state)
    del state[key]
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        check_complete(state)


def test_gaps_and_unknown_keys() -> None:
    """A missing stage or block, a key of another network, and different shapes in a stage are refused."""
    state = official_to_metaformer(released_state("poolformer_s12"))

    def refused(changed: StateDict, part: str) -> None:
        with pytest.raises(ValueError, match=part):
            check_complete(changed)

    refused({key: tensor for key, tensor in state.items() if not key.startswith("stages.1.")}, r"stages\.1\.")
    refused({key: tensor for key, tensor in state.items() if ".blocks.1." not in key}, r"blocks\.1\.")
    refused({key: tensor for key, tensor in state.items() if "stages" not in key}, r"stages\.0\.")
    refused(state | {"extra": torch.zeros(1)}, "extra")
    refused(state | {"stages.2.blocks.1.mlp.fc1.bias": torch.zeros(3)}, r"stages\.2\.blocks\.\*\.mlp\.fc1\.bias")
    refused(state | {"stages.2.blocks.99999999999.mlp.fc1.bias": torch.zeros(3)}, r"blocks\.99999999999\.")
    refused({"layer1.0.conv1.weight": torch.zeros(1)}, r"layer1\.0\.conv1\.weight")
    refused({}, "missing")


def test_unwrapping() -> None:
    """The state dict is found bare, in a training checkpoint with or without an average, and with DDP's prefix."""
    bare, average = {"a.b": torch.zeros(1)}, {"a.b": torch.ones(1)}
    wrapped = {"epoch": 3, "arch": "x", "state_dict": bare, "optimizer": {"state": {}}, "args": Namespace(lr=1.0)}
    assert extract_state(bare, use_ema=False) == bare
    assert extract_state(wrapped, use_ema=False) == bare
    assert extract_state(wrapped | {"state_dict_ema": average}, use_ema=False) == bare
    assert extract_state(wrapped | {"state_dict_ema": average}, use_ema=True) == average
    assert extract_state({"state_dict": {"module.a.b": bare["a.b"]}}, use_ema=False) == bare
    assert extract_state({"model": bare, "state_dict": {"lr": 3}}, use_ema=False) == bare
    mixed = {"module.a.b": bare["a.b"], "a.b": average["a.b"]}
    assert extract_state(mixed, use_ema=False) == mixed


@pytest.mark.parametrize(
    ("keys", "unwrapped"),
    [
        (["module.a.b", "module.c"], ["a.b", "c"]),
        (["_orig_mod.a.b", "_orig_mod.c"], ["a.b", "c"]),
        (["module._orig_mod.a.b", "module._orig_mod.c"], ["a.b", "c"]),
        (["_orig_mod.module._orig_mod.a.b", "_orig_mod.module._orig_mod.c"], ["a.b", "c"]),
        (["a._orig_mod.b", "c"], ["a.b", "c"]),
        (["n_averaged", "module.a.b", "module.c"], ["a.b", "c"]),
        (["n_averaged", "module.module._orig_mod.a.b", "module.module._orig_mod.c"], ["a.b", "c"]),
        (["module.n_averaged", "module.module.a.b"], ["a.b"]),
        (["_orig_mod.n_averaged", "_orig_mod.module.a.b"], ["a.b"]),
        (["n_averaged", "a.b"], ["n_averaged", "a.b"]),
        (["n_averaged"], ["n_averaged"]),
        (["module.a.b", "c"], ["module.a.b", "c"]),
        (["a.b", "a._orig_mod.b"], ["a.b", "a._orig_mod.b"]),
        (["x_orig_mod.a", "modules.b"], ["x_orig_mod.a", "modules.b"]),
    ],
)
def test_wrappers(keys: list[str], unwrapped: list[str]) -> None:
    """Only the key prefixes of torch's wrappers are stripped, in any nesting, and no tensor is lost."""
    state = {key: torch.tensor(number) for number, key in enumerate(keys)}
    found = unwrap(state)
    assert list(found) == unwrapped
    counters = len(keys) - len(unwrapped)
    assert [int(tensor) for tensor in found.values()] == list(range(counters, len(keys)))


@pytest.mark.parametrize(
    "contents", [[1, 2], {}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {1: torch.zeros(1)}, None]
)
def test_no_state_dict(contents: object) -> None:
    """Contents without named tensors, and a missing average, give an error."""
    with pytest.raises(ValueError, match="contains no state dict"):
        extract_state(contents, use_ema=False)
    if isinstance(contents, dict):
        with pytest.raises(ValueError, match="use_ema=true"):
            extract_state(contents, use_ema=True)
