"""Networks of "MetaFormer Baselines for Vision": their function against timm's, their initialisation and parts."""

from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models import MetaFormer, MetaFormerBlock, create_model
from metaformer.models.families import BASELINES
from metaformer.models.heads import MlpClassifier
from metaformer.models.metaformer import ChannelScale
from metaformer.models.token_mixers import Identity, RandomMatrix, SeparableConv
from tests.models.test_metaformer import randomise

IN_TIMM = [name for name in BASELINES if not name.startswith(("identityformer", "randformer"))]
SMALLEST = ("poolformerv2_s12", "convformer_s18", "caformer_s18")
# Appendix.
SIMPLE = {"s12": 0.1, "s24": 0.1, "s36": 0.2, "m36": 0.3}
DROP_PATH = {
    "identityformer": SIMPLE | {"m48": 0.4},
    "randformer": SIMPLE | {"m48": 0.3},
    "poolformerv2": SIMPLE | {"m48": 0.4},
    "convformer": {"s18": 0.2, "s36": 0.3, "m36": 0.4, "b36": 0.6},
    "caformer": {"s18": 0.15, "s36": 0.3, "m36": 0.4, "b36": 0.6},
}
HEAD_DROPOUT = {
    "convformer_b36": 0.0, "caformer_s18": 0.0, "caformer_s36": 0.4, "caformer_m36": 0.4, "caformer_b36": 0.5,
}  # fmt: skip


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return logits and all gradients, with a fixed seed for drop path."""
    torch.manual_seed(2)
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    assert leaf.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "images": leaf.grad, **gradients}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SMALLEST)
def test_function_and_gradients_are_timms(name: str, training: bool) -> None:
    """With random weights in every parameter, logits and every gradient equal timm's, with drop path in training.

    timm's MLP head has a LayerNorm with eps 1e-6 instead of the authors' 1e-5.
    """
    ours = create_model(name, num_classes=7, drop_path_rate=0.4)
    theirs = timm.create_model(name, num_classes=7, drop_path_rate=0.4)
    if name != "poolformerv2_s12":
        assert theirs.head.fc.norm.eps == 1e-6
        theirs.head.fc.norm.eps = ours.head.fc.norm.eps
        assert ours.head.fc.norm.eps == 1e-5
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)).double()
    expected = outcome(theirs.double().train(training), images)
    found = outcome(ours.double().train(training), images)
    assert list(found) == list(expected)
    assert set(dict(ours.named_parameters())) == set(found) - {"logits", "images"}
    rtol = 1e-6 if training else 1e-8  # timm computes the rates of drop path in float32
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=rtol / 10 * value.abs().max().item(), msg=key)
        assert training or value.abs().max() > 0, key  # in training, all images may drop a branch
    if training:
        evaluated = outcome(ours.eval(), images)
        assert (evaluated["logits"] - found["logits"]).abs().max() > 1e-3, "drop path had no effect"


@pytest.mark.parametrize("name", IN_TIMM)
def test_keys_and_shapes_are_timms(name: str) -> None:
    """State dicts have timm's keys and shapes in timm's order, for all 13 networks that timm has."""
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    shapes = [[(key, tensor.shape) for key, tensor in model.state_dict().items()] for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_head_dropout_comes_before_the_last_layer() -> None:
    """With dropout of almost 1 in training, the logits are the last layer's bias, as in the authors' order."""
    head = MlpClassifier(8, 3, dropout=0.999999)
    nn.init.uniform_(head.fc2.bias, 1, 2)
    x = torch.randn(5, 8)
    assert torch.equal(head(x), head.fc2.bias.expand(5, 3))
    assert not torch.equal(head.eval()(x), head.fc2.bias.expand(5, 3))


@pytest.mark.parametrize("name", ["poolformerv2_s12", "caformer_s18"])
def test_initialisation_is_the_authors(name: str) -> None:
    """Every convolution and linear layer starts with std .02; biases start at 0, scales and norms at 1."""
    torch.manual_seed(0)
    model = create_model(name)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            tolerance = 4 * 0.02 / module.weight.numel() ** 0.5
            assert module.weight.std().item() == pytest.approx(0.02, abs=max(tolerance, 1e-4)), key
            assert abs(module.weight.mean().item()) < tolerance, key
            assert module.bias is None or not module.bias.any(), key
    others = [p for key, p in model.named_parameters() if p.ndim == 1 and not key.endswith("bias")]
    assert all(torch.equal(p, torch.ones_like(p)) for p in others)
    biases = [p for key, p in model.named_parameters() if key.endswith("bias")]
    assert not any(p.any() for p in biases)


@pytest.mark.parametrize("name", BASELINES)
def test_scales_and_rates(name: str) -> None:
    """No LayerScale; a residual scale in the last two stages only; the paper's drop path and head dropout."""
    with torch.device("meta"):
        model = create_model(name)
    scaled = {key.split(".")[1] for key, module in model.named_modules() if isinstance(module, ChannelScale)}
    assert scaled == {"2", "3"}
    assert not any("layer_scale" in key for key in model.state_dict())
    blocks = [module for module in model.modules() if isinstance(module, MetaFormerBlock)]
    rates = [float(getattr(block.drop_path2, "drop_prob", 0.0)) for block in blocks]
    assert rates[0] == 0
    family, size = name.split("_")
    assert rates[-1] == pytest.approx(DROP_PATH[family][size])
    steps = [after - before for before, after in pairwise(rates)]
    assert steps == pytest.approx([rates[-1] / (len(rates) - 1)] * len(steps))
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == ([HEAD_DROPOUT.get(name, 0.0)] if name.startswith(("convformer", "caformer")) else [])


def test_mixers_that_timm_does_not_have() -> None:
    """IdentityFormer mixes nothing; RandFormer has frozen matrices over the positions of its last two stages."""
    with torch.device("meta"):
        identity, random = create_model("identityformer_s12"), create_model("randformer_s12")
    kinds = [[type(block.token_mixer) for block in stage.blocks] for stage in identity.stages]  # type: ignore[union-attr]
    assert {kind for stage in kinds for kind in stage} == {Identity}
    matrices = [module for module in random.modules() if isinstance(module, RandomMatrix)]
    assert [tuple(mixer.matrix.shape) for mixer in matrices] == [(196, 196)] * 6 + [(49, 49)] * 2
    assert {key for key, _ in random.named_parameters()} == {key for key, _ in identity.named_parameters()}


def test_head_dropout_of_other_heads_is_refused() -> None:
    """`head_dropout` for a network with a linear head gives one line; for CAFormer it replaces the paper's rate."""
    with pytest.raises(UserError, match=r"^model=poolformerv2_s12: .*head_dropout=0\.3"):
        create_model("poolformerv2_s12", head_dropout=0.3)
    with torch.device("meta"):
        model = create_model("caformer_s36", head_dropout=0.2)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_square_in_float32(dtype: torch.dtype) -> None:
    """Inputs whose square is beyond float16 stay finite in StarReLU and in the head."""
    x = torch.tensor([-3.0, 0.0, 300.0], dtype=dtype)
    for module in (SeparableConv(4, 3).act1, MlpClassifier(4, 2, 0.0).act):
        found = module(x)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 90000.0]))


def test_networks_have_no_default_size() -> None:
    """All but RandFormer take images of any size; an image of another size than RandFormer's is refused by torch."""
    small = {"depths": (1, 1, 1, 1), "dims": (32, 32, 32, 32)}
    for name in ("identityformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18"):
        model = create_model(replace(BASELINES[name], **small), num_classes=2)  # type: ignore[arg-type]
        assert isinstance(model, MetaFormer)
        assert model.eval()(torch.zeros(1, 3, 70, 45)).shape == (1, 2)
