"""Frozen parts of networks, and the layers that learning rates decay over."""

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from metaformer.errors import UserError
from metaformer.models import create_model
from metaformer.models.composition import Composition
from metaformer.models.freezing import freeze
from metaformer.models.fused import fuse

TINY = Composition(depths=(1, 2, 1), dims=(8, 16, 24))


def trained(model: nn.Module) -> set[str]:
    """Return the first two parts of the names of the parameters that train."""
    return {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("stem", {"stages.0", "stages.1", "stages.2", "head.norm", "head.fc"}),
        ("stages:2", {"stages.2", "head.norm", "head.fc"}),
        ("stages:3", {"head.norm", "head.fc"}),
        ("all_but_head", {"head.fc"}),
    ],
)
def test_parts_of_this_projects_networks(part: str, expected: set[str]) -> None:
    """The rest of the network trains; with fused operators, the gradients are the same."""
    torch.manual_seed(0)
    model = create_model(TINY, num_classes=3, drop_path_rate=0.0)
    assert freeze(model, part) == []
    assert trained(model) == expected
    images, gradients = torch.randn(2, 3, 48, 48), []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(images).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        fuse(model)
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "part", "expected", "norms"),
    [
        ("test_resnet", "stages:2", {"layer3", "layer4", "fc"}, True),
        ("test_vit", "stages:1", {"blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5", "norm", "head"}, False),
        ("test_efficientnet", "all_but_head", {"classifier"}, True),
    ],
)
def test_parts_of_timms_networks(name: str, part: str, expected: set[str], norms: bool) -> None:
    """The stages are those that timm names; frozen BatchNorms are returned."""
    model = timm.create_model(name, num_classes=3)
    frozen = freeze(model, part)
    assert {n if n.startswith("blocks.") else n.split(".")[0] for n in trained(model)} == expected
    assert bool(frozen) == norms
    assert all(not p.requires_grad for norm in frozen for p in norm.parameters())


def test_what_cannot_be_frozen() -> None:
    """More stages than the network has, and a network that does not name them."""
    with pytest.raises(UserError, match=r"^model\.freeze=stages:4: MetaFormer has 3 stages$"):
        freeze(create_model(TINY), "stages:4")
    with pytest.raises(UserError, match=r"^model\.freeze=stem: .* does not name its stages; give all_but_head$"):
        freeze(timm.create_model("poolformer_s12"), "stem")


def test_layers_of_this_projects_networks() -> None:
    """timm's layers are the stem, what is between stages, each block, and the head, in this order."""
    model = create_model(Composition(depths=(1, 2, 1), dims=(8, 16, 24), position_embedding_stage=1))
    groups = group_parameters(model, model.group_matcher())
    first = [min(names) for _, names in sorted(groups.items())]
    starts = ("stem.", "stages.0.blocks.0.", "stages.1.downsample", "stages.1.blocks.0.", "stages.1.blocks.1.",
              "stages.2.downsample", "stages.2.blocks.0.", "head.")  # fmt: skip
    assert len(first) == len(starts)
    assert all(name.startswith(start) for name, start in zip(first, starts, strict=True)), first
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
