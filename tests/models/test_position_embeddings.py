"""Tests of weights for images of another size, compared with timm's own resampling."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed_nhwc
from torch import nn

from metaformer.errors import UserError
from metaformer.models import create_model, create_timm_model, load_weights, save_weights
from metaformer.models.classifier import NewHead, load_weights_except_head
from metaformer.models.composition import Composition
from metaformer.models.position_embeddings import PositionResampling

ATTENTION = Composition(
    depths=(1, 1), dims=(4, 32), token_mixers=("pooling", "attention"), norm="layer_norm", position_embedding_stage=1
)  # fmt: skip


def randomize(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_own_networks(tmp_path: Path) -> None:
    """The embedding of a stage is what timm makes of its grid; everything else is loaded as it is."""
    trained, larger = randomize(create_model(ATTENTION, 5, image_size=64)), create_model(ATTENTION, 3, image_size=104)
    save_weights(trained, tmp_path / "w", "x")
    with pytest.raises(UserError, match="is for images of 64 pixels"):
        load_weights_except_head(larger, tmp_path / "w")
    resampling = PositionResampling(larger)
    assert load_weights_except_head(larger, tmp_path / "w", prepare=resampling) == NewHead(5, 3)
    key = "stages.1.position_embedding"
    grid = trained.state_dict()[key].permute(0, 2, 3, 1)
    assert torch.equal(larger.state_dict()[key], resample_abs_pos_embed_nhwc(grid, [13, 13]).permute(0, 3, 1, 2))
    assert torch.equal(larger.state_dict()["stem.conv.weight"], trained.state_dict()["stem.conv.weight"])
    assert resampling.note == f"{key} [1, 32, 8, 8] -> [1, 32, 13, 13], resampled"


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_networks_of_timm(tmp_path: Path, name: str) -> None:
    """All tensors are those that timm's own loading makes for the size."""
    save_weights(randomize(timm.create_model(name)), tmp_path / "w.safetensors", name)
    overlay = {"file": str(tmp_path / "w.safetensors")}
    expected = timm.create_model(name, img_size=96, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    model = create_timm_model(name, image_size=96)
    resampling = PositionResampling(model)
    load_weights(model, tmp_path / "w.safetensors", convert=resampling)
    assert resampling.note.startswith("pos_embed [1, 10")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size", "side"), [("cait_xxs24_224", 288, 18), ("pit_ti_224", 288, 35), ("volo_d1_224", 288, 18)]
)
def test_networks_that_timm_leaves_at_one_size(tmp_path: Path, name: str, size: int, side: int) -> None:
    """timm makes these networks for other sizes but refuses their weights: their grids are resampled like others."""
    trained = randomize(timm.create_model(name, num_classes=2))
    save_weights(trained, tmp_path / "w", name)
    model = create_timm_model(name, 2, image_size=size)
    load_weights(model, tmp_path / "w", convert=PositionResampling(model))
    before, now = trained.get_parameter("pos_embed"), model.get_parameter("pos_embed")
    if name == "pit_ti_224":
        expected = resample_abs_pos_embed_nhwc(before.permute(0, 2, 3, 1), [side, side]).permute(0, 3, 1, 2)
    else:
        expected = resample_abs_pos_embed_nhwc(before.reshape(1, 14, 14, -1), [side, side]).reshape(now.shape)
    assert torch.allclose(now, expected, atol=1e-6)
    assert torch.equal(model.get_parameter("head.weight"), trained.get_parameter("head.weight"))
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, size, size)).isfinite().all()


@pytest.mark.parametrize("name", ["levit_128s", "nest_tiny"])
def test_networks_without_a_grid(tmp_path: Path, name: str) -> None:
    """Tables of offsets and embeddings of blocks are not resampled: one line names the setting."""
    save_weights(timm.create_model(name, num_classes=2), tmp_path / "w", name)
    model = create_timm_model(name, 2, image_size=288)
    with pytest.raises(
        UserError, match=r"w: is for images of another size \(.* and \d+ more\); set image_size to that"
    ):
        load_weights(model, tmp_path / "w", convert=PositionResampling(model))


def test_the_same_size(tmp_path: Path) -> None:
    """Nothing is resampled or said."""
    save_weights(timm.create_model("test_vit"), tmp_path / "w", "test_vit")
    resampling = PositionResampling(model := create_timm_model("test_vit", image_size=160))
    load_weights(model, tmp_path / "w", convert=resampling)
    assert resampling.note == ""


def test_other_networks(tmp_path: Path) -> None:
    """Weights that also differ in something else are refused, and so is a size that a network of timm cannot take."""
    wider = create_model(replace(ATTENTION, dims=(4, 64)), 3, image_size=64)
    save_weights(wider, tmp_path / "w", "x")
    model = create_model(ATTENTION, 3, image_size=96)
    with pytest.raises(UserError, match="do not fit this model"):
        load_weights(model, tmp_path / "w", convert=PositionResampling(model))
    save_weights(timm.create_model("test_vit", patch_size=8), tmp_path / "w", "x")
    vit = create_timm_model("test_vit")
    with pytest.raises(UserError, match=r"patch_embed\.proj\.weight is \[64, 3, 8, 8\]"):
        load_weights(vit, tmp_path / "w", convert=PositionResampling(vit))
    with pytest.raises(
        UserError, match=r"^image_size=101: timm's test_vit is for images of 160 pixels and takes no oth"
    ):
        create_timm_model("test_vit", image_size=101)
