"""Tests of Grad-CAM on networks where the answer is known, and of the part of a network that it looks at."""

import pytest
import timm
import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models import Composition, create_model
from metaformer.models.last_stage import find_layer
from metaformer.prediction.grad_cam import grad_cam

SCORES = torch.tensor([[2.0, -1.0], [-3.0, 4.0]])  # of two classes, by the mean of two channels


class Known(nn.Module):
    """Two features of an image, its red and its green channel, in one of three layouts; logits from their means."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.layout = layout

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, :2]
        if self.layout == "channels last":
            x = x.permute(0, 2, 3, 1)
        elif self.layout == "tokens":
            x = torch.cat([torch.full((len(x), 3, 2), 9.0), x.flatten(2).transpose(1, 2)], 1)
        x = self.features(x)
        if self.layout == "channels first":
            means = x.mean((2, 3))
        elif self.layout == "channels last":
            means = x.mean((1, 2))
        else:
            means = x[:, 3:].mean(1)
        logits: Tensor = means @ SCORES.T
        return logits


@pytest.mark.parametrize("layout", ["channels first", "channels last", "tokens"])
def test_known_answer(layout: str) -> None:
    """The map is the positive part of the channels, weighted with the scores of the most probable class."""
    images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)) - 0.5
    model = Known(layout)
    with torch.no_grad():
        logits, maps = grad_cam(model, model.features, images)
        assert torch.equal(logits, model(images))
    scores = SCORES[logits.argmax(1)]
    expected = (scores[:, :, None, None] * images[:, :2]).sum(1).relu()
    assert {0, 1} == set(logits.argmax(1).tolist())
    assert torch.allclose(maps, expected / expected.amax((1, 2), keepdim=True), atol=1e-6)


def test_nothing_speaks_for_the_class() -> None:
    """A map is zero, not NaN, where every position speaks against the class."""
    images = -torch.ones(1, 3, 4, 4)
    model = Known("channels first")
    _, maps = grad_cam(model, model.features, images * torch.tensor([1.0, 1.5, 0.0]).view(3, 1, 1))
    assert maps.eq(0).all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_last_stage_of_this_projects_networks(channels_last: bool) -> None:
    """The last stage is found, the logits are the network's, and no gradient reaches its parameters."""
    model = create_model(Composition(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)), 5).eval()
    images = torch.rand(2, 3, 96, 96)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    layer = find_layer(model, None, "--cam-layer")
    assert layer is model.stages[3]
    logits, maps = grad_cam(model, layer, images)
    assert maps.shape == (2, 3, 3)
    assert torch.equal(logits, model(images).detach())
    assert find_layer(model, "stages.1", "--cam-layer") is model.stages[1]
    assert grad_cam(model, model.stages[1], images)[1].shape == (2, 12, 12)
    assert all(parameter.grad is None for parameter in model.head.parameters())


@pytest.mark.parametrize(("name", "side"), [("test_resnet", 5), ("test_vit", 10), ("test_efficientnet", 5)])
def test_networks_of_timm(name: str, side: int) -> None:
    """The last stage of a network of timm is found; of a transformer with a class token, positions have gradients."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    _, maps = grad_cam(model, find_layer(model, None, "--cam-layer"), torch.rand(2, 3, 160, 160))
    assert maps.shape == (2, side, side)
    assert maps.amax((1, 2)).eq(1).all()


def test_wrong_layers() -> None:
    """A name that does not exist, and a layer without positions or without influence, are named."""
    model = create_model(Composition(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)), 5).eval()
    with pytest.raises(UserError, match=r"^--cam-layer=stage\.3: no such part .* consists of stem, stages, head$"):
        find_layer(model, "stage.3", "--cam-layer")
    with pytest.raises(ValueError, match="not a tensor of features or tokens"):
        grad_cam(model, model.head, torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="its output has a single position"):
        grad_cam(model, model.stages[3], torch.rand(1, 3, 32, 32))
    with pytest.raises(UserError, match="the last stage of Linear is not known"):
        find_layer(nn.Linear(1, 1), None, "--cam-layer")
