"""The network's function, initialisation and drop path."""

import pytest
import timm
import torch
from timm.models import FeatureListNet
from torch import Tensor, nn
from torch.nn import functional

from metaformer.errors import UserError
from metaformer.models import MetaFormer, create_model
from metaformer.models.metaformer import Architecture, BlockParts, MetaFormerBlock
from metaformer.models.token_mixers import Pooling, check_pooling


@pytest.fixture(scope="module")
def fresh() -> MetaFormer:
    torch.manual_seed(0)
    return create_model("poolformer_s12", num_classes=10)


def small(drop_path_rate: float = 0.0) -> MetaFormer:
    return MetaFormer(Architecture((1, 1, 2, 1), (8, 16, 24, 32), [Pooling] * 4, drop_path_rate), num_classes=5)


def randomise(model: nn.Module) -> None:
    """Set values with which every parameter affects the output; LayerScale at 1e-5 would hide the blocks."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5 if name.endswith(("scale", "weight")) else -0.5, 1.0)


def test_forward_equals_timm_with_the_papers_head(fresh: MetaFormer) -> None:
    """Features equal timm's with the same weights; the head is GroupNorm(eps 1e-5), mean, linear."""
    model = create_model("poolformer_s12", num_classes=10).eval()
    randomise(model)
    reference = timm.create_model("poolformer_s12", num_classes=10).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        features = reference.forward_features(images)
        norm, fc = reference.head.norm, reference.head.fc
        expected = fc(functional.group_norm(features, 1, norm.weight, norm.bias, 1e-5).mean((2, 3)))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
        assert (reference(images) - expected).abs().max() > 0.01, "the order of the head must affect the result"


@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12", "caformer_s18"])
def test_features_as_in_timm(name: str) -> None:
    """Feature map, features before the classifier and maps of all stages are those that the logits are made of."""
    model = create_model(name, num_classes=10).eval()
    randomise(model)
    reference = timm.create_model(name, num_classes=10).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        features = model.forward_features(images)
        before = model.forward_head(features, pre_logits=True)
        assert (features.shape, before.shape) == ((2, model.num_features, 3, 2), (2, model.num_features))
        torch.testing.assert_close(features, reference.forward_features(images), rtol=1e-4, atol=1e-4)
        logits = model(images)
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.get_classifier()(before), logits)
        assert model.feature_info == reference.feature_info
        stages = FeatureListNet(model, out_indices=range(4), flatten_sequential=True)
        for found, expected in zip(stages(images), reference.forward_intermediates(images)[1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_block_and_mixer_equal_their_formulas() -> None:
    """A block is x + s1 (pool(n(x)) - n(x)), then x + s2 mlp(n(x)), without padding in the pool and with exact GELU."""
    block = MetaFormerBlock(4, 7, Pooling, 0.0, BlockParts(layer_scale_init=0.5))
    randomise(block)
    x = torch.randn(2, 4, 5, 7)

    def norm(x: Tensor, layer: nn.Module) -> Tensor:
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)  # type: ignore[operator]

    def window_sum(x: Tensor) -> Tensor:
        return functional.unfold(x.flatten(0, 1)[:, None], 3, padding=1).sum(1).view_as(x)

    def channels(x: Tensor, conv: nn.Module) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        return torch.einsum("bchw,oc->bohw", x, conv.weight[:, :, 0, 0]) + conv.bias.view(-1, 1, 1)

    n = norm(x, block.norm1)
    y = x + block.layer_scale1.scale.view(-1, 1, 1) * (window_sum(n) / window_sum(torch.ones_like(n)) - n)
    hidden = channels(norm(y, block.norm2), block.mlp.fc1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = y + block.layer_scale2.scale.view(-1, 1, 1) * channels(hidden, block.mlp.fc2)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("channel_mlp", [True, False])
def test_ablated_blocks_omit_one_part(residual: bool, channel_mlp: bool) -> None:
    """Without the residual a branch replaces its input; without the channel MLP there is no second branch."""
    parts = BlockParts(layer_scale_init=0.5, residual=residual, channel_mlp=channel_mlp)
    block = MetaFormerBlock(4, 5, Pooling, 0.0, parts)
    randomise(block)
    x = torch.randn(2, 4, 5, 5)
    expected = x * residual + block.layer_scale1(block.token_mixer(block.norm1(x)))
    if channel_mlp:
        expected = expected * residual + block.layer_scale2(block.mlp(block.norm2(expected)))
    torch.testing.assert_close(block(x), expected)
    assert any(key.startswith("mlp.") for key in block.state_dict()) == channel_mlp


def test_linear_and_mlp_layers_start_as_truncated_normal(fresh: MetaFormer) -> None:
    """MLP convolutions and the classifier start with standard deviation .02 and bias 0."""
    layers = [m for name, m in fresh.named_modules() if name.endswith(("fc1", "fc2", "head.fc"))]
    assert len(layers) == 2 * 12 + 1
    for layer in layers:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.06)
        assert abs(layer.weight.mean().item()) < 0.001
        assert layer.bias is not None
        assert not layer.bias.any()


def test_stem_and_downsampling_keep_pytorchs_initialisation(fresh: MetaFormer) -> None:
    """Convolutions outside the MLPs are uniform in +-1/sqrt(fan_in), including biases, as in nn.Conv2d."""
    convs = [m for name, m in fresh.named_modules() if name.endswith(".conv") and isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size, c.stride, c.padding) for c in convs] == [((7, 7), (4, 4), (2, 2))] + [
        ((3, 3), (2, 2), (1, 1))
    ] * 3
    for conv in convs:
        bound = conv.weight[0].numel() ** -0.5
        assert conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert conv.bias is not None
        assert 0.8 * bound < conv.bias.abs().max() <= bound


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_path_rises_linearly_from_zero(rate: float) -> None:
    """Both branches of block i of n drop with probability rate * i / (n - 1)."""
    blocks = [m for m in small(drop_path_rate=rate).modules() if isinstance(m, MetaFormerBlock)]
    rates = [[getattr(path, "drop_prob", 0.0) for path in (b.drop_path1, b.drop_path2)] for b in blocks]
    assert rates == [[pytest.approx(rate * i / 4)] * 2 for i in range(5)]


def test_drop_path_drops_whole_branches_in_training_only() -> None:
    """With a rate of almost 1 in the last block, training drops that block's branches and evaluation keeps them."""
    model = small(drop_path_rate=0.999999)
    randomise(model)
    block, x = model.stages[3].blocks[0], torch.randn(2, 32, 3, 3)  # type: ignore[index]
    assert torch.equal(block.train()(x), x)  # type: ignore[union-attr]
    assert not torch.allclose(block.eval()(x), x, atol=0.1)  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [32, 33, 97])
def test_any_size_from_32_up_gives_logits(size: int) -> None:
    """Images of at least 32 x 32 give one row of logits each, and every parameter gets a finite gradient."""
    model = small()
    logits = model(torch.randn(2, 3, size, size + 5))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_pooling_check_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes for correct pooling, and refuses a wrong channels_last gradient."""
    check_pooling(torch.device("cpu"))
    right = Pooling.forward

    def wrong(self: Pooling, x: Tensor) -> Tensor:
        return right(self, x) if x.is_contiguous() else right(self, x.detach()) + x

    monkeypatch.setattr(Pooling, "forward", wrong)
    with pytest.raises(UserError, match="channels_last=false"):
        check_pooling(torch.device("cpu"))
