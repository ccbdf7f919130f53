"""Token mixers of the ablations; the check of the pooling gradient is tested in test_metaformer.py."""

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional

from metaformer.models.token_mixers import Attention, DepthwiseConv, Identity, Pooling, RandomMatrix, SpatialFC


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 64, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_pooling_averages_its_window(size: int, x: torch.Tensor) -> None:
    """Pooling is the mean over the part of the window inside the image, minus the input."""
    mixed = Pooling(64, 5, pool_size=size)(x)
    half = size // 2
    for row, column in ((0, 0), (2, 3), (4, 4)):
        window = x[:, :, max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1]
        torch.testing.assert_close(mixed[:, :, row, column], window.mean((2, 3)) - x[:, :, row, column])


def test_identity_returns_its_input(x: torch.Tensor) -> None:
    """The identity returns the same tensor."""
    assert Identity(64, 5)(x) is x


def test_random_matrix_mixes_positions_and_is_never_trained(x: torch.Tensor) -> None:
    """Each position becomes a mean of all, weighted by a row of softmax(U[0, 1)), which is a buffer."""
    mixer = RandomMatrix(64, 5)
    assert not list(mixer.parameters())
    assert list(mixer.state_dict()) == ["matrix"]
    torch.testing.assert_close(mixer.matrix.sum(1), torch.ones(25))
    ratio = mixer.matrix.max(1).values / mixer.matrix.min(1).values
    assert ((ratio > 1.5) & (ratio < torch.e)).all(), "ratios of exponentials of numbers in [0, 1)"
    expected = torch.einsum("mn,bcn->bcm", mixer.matrix, x.flatten(2)).view(x.shape)
    torch.testing.assert_close(mixer(x), expected)
    assert not torch.equal(RandomMatrix(64, 5).matrix, mixer.matrix)


def test_depthwise_conv_keeps_channels_apart(x: torch.Tensor) -> None:
    """Each channel has its own 3x3 filter and bias, with PyTorch's initialisation."""
    mixer = DepthwiseConv(64, 5)
    expected = [functional.conv2d(x[:, i : i + 1], mixer.conv.weight[i : i + 1], padding=1) for i in range(64)]
    assert mixer.conv.bias is not None
    torch.testing.assert_close(mixer(x), torch.cat(expected, 1) + mixer.conv.bias.view(-1, 1, 1), rtol=1e-4, atol=1e-5)
    assert 0.3 < mixer.conv.weight.abs().max() <= 1 / 3


def test_attention_equals_timms(x: torch.Tensor) -> None:
    """The mixer equals timm's attention over the flattened positions, with 32 channels per head and no qkv bias."""
    mixer = Attention(64, 5)
    assert mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.2)
    reference = timm.layers.Attention(64, num_heads=2, qkv_bias=False)
    reference.load_state_dict(mixer.state_dict(), strict=True)
    expected = reference(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Attention, SpatialFC, RandomMatrix])
def test_memory_format_does_not_matter(kind: type[nn.Module], x: torch.Tensor) -> None:
    """Values and gradients are the same for channels_last input."""
    mixer = kind(64, 5)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=memory_format).requires_grad_()
        (out := mixer(leaf)).square().sum().backward()
        results.append((out, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_spatial_fc_is_a_linear_layer_over_positions(x: torch.Tensor) -> None:
    """One matrix over the 25 positions is shared by all channels, without bias and with initial std .02."""
    mixer = SpatialFC(64, 5)
    assert list(mixer.state_dict()) == ["fc.weight"]
    assert mixer.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    expected = torch.einsum("mn,bcn->bcm", mixer.fc.weight, x.flatten(2)).view(x.shape)
    torch.testing.assert_close(mixer(x), expected)
