"""The named networks."""

import pytest
import timm
import torch

from metaformer.errors import UserError
from metaformer.models import MetaFormerBlock, create_model, create_timm_model, list_models

# name: parameters at 1000 classes, blocks, drop path rate, LayerScale's initial value (paper, table 1 and appendix)
PAPER = {
    "poolformer_s12": (11_915_176, 12, 0.1, 1e-5),
    "poolformer_s24": (21_388_968, 24, 0.1, 1e-5),
    "poolformer_s36": (30_862_760, 36, 0.2, 1e-6),
    "poolformer_m36": (56_172_520, 36, 0.3, 1e-6),
    "poolformer_m48": (73_473_448, 48, 0.4, 1e-6),
}


def test_list_names_the_papers_networks() -> None:
    """`list_models` gives the five networks in the paper's order."""
    assert list_models() == list(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_network_is_the_papers(name: str) -> None:
    """Parameter count, depth, drop path and LayerScale are the paper's; keys and shapes are timm's, both ways."""
    parameters, depth, drop_path, layer_scale = PAPER[name]
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    blocks = [m for m in model.modules() if isinstance(m, MetaFormerBlock)]
    assert len(blocks) == depth
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(drop_path)
    scales = torch.cat([scale.scale for b in blocks for scale in (b.layer_scale1, b.layer_scale2)])
    assert torch.equal(scales, torch.full_like(scales, layer_scale))
    with torch.device("meta"):
        reference = timm.create_model(name)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert [(key, tensor.shape) for key, tensor in ours.items()] == [(k, t.shape) for k, t in theirs.items()]
    reference.load_state_dict(ours, strict=True, assign=True)
    model.load_state_dict(reference.state_dict(), strict=True)


def test_arguments_override_the_papers_values() -> None:
    """`num_classes` sizes the classifier and `drop_path_rate`, 0 too, replaces the paper's rate."""
    model = create_model("poolformer_s12", num_classes=7, drop_path_rate=0.0)
    assert model.head.fc.weight.shape == (7, 512)
    assert not [m for m in model.modules() if getattr(m, "drop_prob", 0)]


@pytest.mark.parametrize("create", [create_model, create_timm_model])
def test_unknown_name_is_refused(create: type) -> None:
    """An unknown network is a UserError of one line that names the field, the name and the nearest known name."""
    with pytest.raises(UserError, match=r"^model\.name=poolformer_s13: unknown; .*\bpoolformer_s12\b.*$"):
        create("poolformer_s13")


def test_timm_network_takes_classes_and_drop_path() -> None:
    """timm's networks are made by name, with our number of classes and drop path rate, without pretrained weights."""
    model = create_timm_model("test_vit", num_classes=7, drop_path_rate=0.25)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 7)
    assert max(getattr(m, "drop_prob", None) or 0 for m in model.modules()) == pytest.approx(0.25)


def test_timm_network_without_drop_path_refuses_a_rate() -> None:
    """A drop path rate for a network that has none is a UserError naming field and network; without a rate it works."""
    with pytest.raises(UserError, match=r"^model\.drop_path_rate=0\.1: .*ghostnet_050.*$"):
        create_timm_model("ghostnet_050", drop_path_rate=0.1)
    assert create_timm_model("ghostnet_050", num_classes=3).get_classifier().out_features == 3  # type: ignore[operator]
