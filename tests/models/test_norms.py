"""Norms, and the search for a BatchNorm that cannot train on one image."""

import copy

import pytest
import torch
from torch import nn

from metaformer.models import create_model
from metaformer.models.norms import ChannelLayerNorm, find_single_value_batch_norm, group_norm, no_norm


def test_group_norm_is_over_channels_and_space() -> None:
    """Each image is normalised over all its values with eps 1e-5, followed by an affine per channel."""
    norm, x = group_norm(4), torch.randn(2, 4, 5, 7) * 3 + 1
    assert isinstance(norm, nn.GroupNorm)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected)


def test_channel_layer_norm_is_over_channels_of_each_position() -> None:
    """Each position is normalised over its channels, followed by the affine; the memory format is kept."""
    norm = ChannelLayerNorm(4)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = (torch.randn(2, 4, 5, 7) * 0.01 + 1).to(memory_format=torch.channels_last)  # a variance close to eps
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    expected = (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)


def test_no_norm_changes_nothing() -> None:
    """The ablation without norms returns its input."""
    x = torch.randn(2, 4, 5, 7)
    assert no_norm(4)(x) is x


@pytest.mark.parametrize(
    ("name", "image_size", "found"),
    [
        ("metaformer_s12_batch_norm", 32, "stages.3.blocks.0.norm1"),
        ("metaformer_s12_batch_norm", 64, None),
        ("poolformer_s12", 32, None),
    ],
)
def test_batch_norm_with_one_value_per_image(name: str, image_size: int, found: str | None) -> None:
    """The first BatchNorm with one value per channel and image is found, and the model is left unchanged."""
    model = create_model(name, num_classes=3, image_size=image_size)
    model.stem.eval()
    before = copy.deepcopy(model.state_dict())
    assert find_single_value_batch_norm(model, torch.randn(1, 3, image_size, image_size)) == found
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (model.training, model.stem.training, model.stages.training) == (True, False, True)
    if found is not None:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model.train()(torch.randn(1, 3, image_size, image_size))
