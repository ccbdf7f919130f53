"""Weight files."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metaformer.errors import UserError
from metaformer.models import MetaFormer, load_weights, save_weights
from metaformer.models.token_mixers import Pooling


def small(num_classes: int = 5, depth: int = 1) -> MetaFormer:
    return MetaFormer((1, 1, depth, 1), (4, 8, 12, 16), [Pooling] * 4, num_classes)


def message(model: nn.Module, path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        load_weights(model, path)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1
    return text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_weights(small(), path, "a_small_network")
    return path


def test_round_trip(tmp_path: Path) -> None:
    """Weights come back bit for bit, from any memory format, into a network that differed."""
    saved = small().to(memory_format=torch.channels_last)
    save_weights(saved, tmp_path / "w", "a_small_network")
    loaded = small()
    assert not torch.equal(loaded.stem.conv.weight, saved.stem.conv.weight)
    load_weights(loaded, str(tmp_path / "w"))
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_timm_loads_our_file_and_we_load_timms(tmp_path: Path) -> None:
    """A file from `save_weights` loads into timm's poolformer as it is, and timm's state dict loads into ours."""
    reference = timm.models.metaformer.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(4, 8, 12, 16),
        num_classes=5,
        token_mixers=timm.models.metaformer.Pooling,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=timm.models.metaformer.GroupNorm1,
        downsample_norm=None,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
    )
    save_file({key: tensor + 1 for key, tensor in reference.state_dict().items()}, tmp_path / "timm")
    model = small()
    load_weights(model, tmp_path / "timm")
    save_weights(model, tmp_path / "ours", "a_small_network")
    reference.load_state_dict(load_file(tmp_path / "ours"), strict=True)
    assert torch.equal(reference.state_dict()["stem.conv.weight"], model.stem.conv.weight)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A missing file, or a folder in its place, is a UserError that names it."""
    assert "no such" in message(small(), tmp_path / "nothing")
    assert "no such" in message(small(), tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_file_is_named(file: Path, keep: int) -> None:
    """A file cut anywhere, or one that is no safetensors file, is a UserError that names it."""
    file.write_bytes(file.read_bytes()[:keep])
    assert "safetensors" in message(small(), file)
    file.write_bytes(b"not weights at all, but text\n" * 9)
    assert "safetensors" in message(small(), file)


def test_other_class_count_is_named(file: Path) -> None:
    """Weights for another number of classes name the network in the file, the first tensor and both shapes."""
    text = message(small(num_classes=6), file)
    assert "a_small_network" in text
    assert "head.fc.weight is [5, 16], not [6, 16] and 1 more" in text


def test_other_network_is_named_and_leaves_the_model_as_it_was(file: Path) -> None:
    """Missing and unexpected keys are named, one each; nothing of the file is loaded."""
    deeper = small(depth=2)
    before = deeper.stem.conv.weight.clone()
    assert "missing stages.2.blocks.1." in message(deeper, file)
    assert torch.equal(deeper.stem.conv.weight, before)
    save_weights(deeper, file, "a_deeper_network")
    assert "unexpected stages.2.blocks.1." in message(small(), file)


def test_file_of_unknown_origin_is_refused_without_a_name(tmp_path: Path) -> None:
    """A safetensors file without metadata still gets its difference told."""
    save_file({"x": torch.zeros(1)}, tmp_path / "w")
    assert "missing stem.conv.weight and" in message(small(), tmp_path / "w")
