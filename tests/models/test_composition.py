"""Networks composed of named parts, and parts of one's own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models import create_model
from metaformer.models.architectures import build_architecture
from metaformer.models.composition import (
    ACTIVATIONS,
    CHANNEL_MLPS,
    HEADS,
    NORMS,
    RESIDUALS,
    TOKEN_MIXERS,
    Composition,
)
from metaformer.models.families import COMPOSITIONS
from metaformer.models.fused import fuse
from tests.models.test_metaformer import randomise

SMALL = Composition(depths=(1, 2, 1), dims=(32, 32, 64), drop_path_rate=0.3)
# One change of PoolFormer's composition for each name in the tables.
CHANGES: list[dict[str, Any]] = [
    *({"token_mixers": (name,)} for name in TOKEN_MIXERS),
    *({"norm": name} for name in NORMS),
    *({"activation": name} for name in ACTIVATIONS),
    *({"channel_mlps": (name,)} for name in CHANNEL_MLPS),
    *({"residuals": (name,)} for name in RESIDUALS),
    *({"downsampling_norm": name} for name in NORMS),
    *({"head": name} for name in HEADS),
    {"layer_scale": 0.0},
    {"position_embedding_stage": 1},
    {"residuals": ("plain", "scaled", "none"), "channel_mlps": ("conv", "none", "linear")},
]


class Shift(nn.Module):
    """A token mixer of one's own: the position to the right."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1) * self.weight.view(-1, 1, 1)


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return logits and the parameters' gradients, with a fixed seed for drop path."""
    torch.manual_seed(3)
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_part_fits_every_other(change: dict[str, Any]) -> None:
    """PoolFormer with any part exchanged trains: all parameters get finite gradients.

    Where some stages use fused operators, values and gradients stay the same; blocks that the operators do not know
    keep the plain path.
    """
    torch.manual_seed(0)
    model = create_model(replace(SMALL, **change), num_classes=3, image_size=48).double()
    randomise(model)
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    expected = outcome(model, images)
    assert set(expected) - {"logits"} == {name for name, _ in model.named_parameters()}
    assert all(value.isfinite().all() for value in expected.values())
    fuse(model)
    for name, value in outcome(model, images).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9 * expected["logits"].abs().max().item())


def test_each_part_changes_the_function() -> None:
    """Compositions with the same keys compute different functions, so that no name is ignored."""
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    seen: dict[tuple[float, ...], dict[str, Any]] = {}
    for change in CHANGES:
        composition = replace(SMALL, **change)
        linear = change.get("channel_mlps", ("conv",))[0].startswith("linear")  # the same function as "conv"
        if composition == SMALL or linear:
            continue
        torch.manual_seed(0)
        model = create_model(composition, num_classes=3, image_size=48).eval()
        randomise(model)
        logits = tuple(model(images).flatten().tolist())
        assert logits not in seen, f"{change} computes what {seen.get(logits)} does"
        seen[logits] = change


def test_linear_layers_are_convolutions() -> None:
    """The channel MLPs `conv` and `linear` compute the same function of the same values, in both memory formats."""
    conv, linear = (create_model(replace(SMALL, channel_mlps=(name,)), 3).eval() for name in ("conv", "linear"))
    randomise(conv)
    linear.load_state_dict(
        {key: value.view(linear.state_dict()[key].shape) for key, value in conv.state_dict().items()}
    )
    images = torch.randn(2, 3, 40, 56)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = conv(images.contiguous(memory_format=memory_format))
        torch.testing.assert_close(found, linear(images), rtol=1e-4, atol=1e-4)
    assert linear.state_dict()["stages.0.blocks.0.mlp.fc1.weight"].shape == (128, 32)


def test_parts_of_ones_own() -> None:
    """`package.module:Class` names a token mixer, norm or activation outside this project."""
    own = replace(
        SMALL,
        token_mixers=("pooling", f"{__name__}:Shift", "attention"),
        activation="torch.nn:Hardswish",
        norm="torch.nn:InstanceNorm2d",
    )
    assert own.own_parts == ["torch.nn:InstanceNorm2d", "torch.nn:Hardswish", f"{__name__}:Shift"]
    model = create_model(own, num_classes=3)
    kinds = [type(stage.blocks[0].token_mixer).__name__ for stage in model.stages]  # type: ignore[union-attr,index]
    assert kinds == ["Pooling", "Shift", "Attention"]
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 3)


@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=list(COMPOSITIONS))
def test_text_restores_a_composition(composition: Composition) -> None:
    """A composition written as JSON is read as the same composition."""
    restored = Composition.from_json(composition.to_json())
    assert restored == composition.canonical()
    assert restored.canonical() == restored
    assert composition.own_parts == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"depth": [1]}', '{"depths": 3}', '{"depths": ["1"]}', '{"norm": 5}', '{"norms": "none"}',
     '{"token_mixers": [1]}', '{"layer_scale": true}', '{"depths": [true]}', '{"head": null}', '{"dims": [1, 2]}'],
)  # fmt: skip
def test_other_text_is_refused(text: str) -> None:
    """Text that is no composition gives an error."""
    with pytest.raises(ValueError, match=r".+"):
        Composition.from_json(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depths": (2, 2)}, ("model.dims=[32, 32, 64]", "3 stages", "one number for each stage")),
        ({"depths": ()}, ("model.depths=[]", "positive")),
        ({"depths": (1, 0, 1)}, ("model.depths=[1, 0, 1]", "positive")),
        ({"token_mixers": ("pooling", "pooling")}, ("model.token_mixers=", "2 names for 3 stages")),
        ({"token_mixers": ("poolin",)}, ("model.token_mixers=poolin", "did you mean pooling")),
        ({"norm": "layernorm"}, ("model.norm=layernorm", "layer_norm")),
        ({"activation": "star"}, ("model.activation=star", "star_relu")),
        ({"channel_mlps": ("a.b:C",)}, ("model.channel_mlps=a.b:C", "known: conv")),
        ({"residuals": ("scale",)}, ("model.residuals=scale", "scaled")),
        ({"head": "mpl"}, ("model.head=mpl", "mlp")),
        ({"initialization": "none"}, ("model.initialization=none", "all")),
        ({"dims": (32, 48, 64), "token_mixers": ("attention",)}, ("model.dims=[32, 48, 64]", "48", "multiples of 32")),
        ({"position_embedding_stage": 3}, ("model.position_embedding_stage=3", "[0, 2]")),
        ({"drop_path_rate": 1.0}, ("model.drop_path_rate=1.0", "[0, 1)")),
        ({"head_dropout": 0.1}, ("model.head_dropout=0.1", "mlp")),
        ({"layer_scale": -1.0}, ("model.layer_scale=-1.0", "0 for none")),
        ({"norm": "no_such_package.norms:Norm"}, ("model.norm=no_such_package.norms:Norm", "cannot be imported")),
        ({"norm": "torch.nn:NoSuchNorm"}, ("model.norm=torch.nn:NoSuchNorm", "cannot be imported")),
        ({"norm": "math:pi"}, ("model.norm=math:pi", "neither a class nor a function")),
        ({"norm": "torch.nn:Conv2d"}, ("cannot be made", "Conv2d")),
    ],
    ids=str,
)
def test_impossible_combinations_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    """One line with the field, its value and what is possible."""
    with pytest.raises(UserError) as caught:
        create_model(replace(SMALL, **change), num_classes=3)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_defaults_are_poolformer_s12() -> None:
    """A composition without values is PoolFormer-S12."""
    assert Composition() == COMPOSITIONS["poolformer_s12"]
    assert build_architecture(Composition()).depths == (2, 2, 6, 2)
