"""New heads for weights of other classes."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models import create_model, save_weights
from metaformer.models.classifier import NewHead, classifier_names, load_weights_except_head
from metaformer.models.composition import Composition
from metaformer.models.norms import Norm

TINY = Composition(depths=(1, 1), dims=(4, 8))
MLP = Composition(depths=(1, 1), dims=(4, 8), head="mlp")


class Constant(nn.Module):
    """A head of one's own without a layer for the classes."""

    def __init__(self, dim: int, num_classes: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), -1)


def make(name: str | Composition, num_classes: int) -> nn.Module:
    """Make a network of this project or of timm."""
    if isinstance(name, Composition):
        return create_model(name, num_classes)
    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    return model


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (TINY, ("head.fc",)),
        (MLP, ("head.fc.fc2",)),
        ("test_resnet", ("fc",)),
        ("test_vit", ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("levit_128s", ("head.linear", "head_dist.linear")),
    ],
    ids=str,
)
def test_all_but_the_classifier_is_loaded(tmp_path: Path, name: str | Composition, layers: tuple[str, ...]) -> None:
    """With one head or two, only the layers with an output for each class are new; `always` keeps them new too."""
    torch.manual_seed(0)
    saved, model = make(name, 5), make(name, 3)
    assert classifier_names(model) == layers
    save_weights(saved, tmp_path / "w", "x")
    fresh = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert load_weights_except_head(model, tmp_path / "w") == NewHead(5, 3)
    kept = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, saved.state_dict()[key])}
    assert kept <= {key for key in fresh if key.startswith(tuple(f"{layer}." for layer in layers))}
    assert {f"{layer}.weight" for layer in layers} <= kept
    assert all(torch.equal(model.state_dict()[key], fresh[key]) for key in kept)
    same = make(name, 5)
    assert load_weights_except_head(same, tmp_path / "w", always=True) == NewHead(5, 5)
    assert not torch.equal(same.get_parameter(f"{layers[0]}.weight"), saved.get_parameter(f"{layers[0]}.weight"))
    assert load_weights_except_head(same, tmp_path / "w") is None
    assert torch.equal(same.get_parameter(f"{layers[0]}.weight"), saved.get_parameter(f"{layers[0]}.weight"))


def test_weights_without_a_head(tmp_path: Path) -> None:
    """Weights that end with the features, as of self-supervised training, take a new head."""
    model, saved = make("test_vit", 3), make("test_vit", 0)
    save_file(saved.state_dict(), tmp_path / "w")
    assert load_weights_except_head(model, tmp_path / "w") == NewHead(None, 3)


@pytest.mark.parametrize(
    "other", [MLP, Composition(depths=(1, 1), dims=(4, 16)), Composition(depths=(1, 2), dims=(4, 8))]
)
def test_everything_else_must_match(tmp_path: Path, other: Composition) -> None:
    """A network that differs in more than its number of classes is refused, and the model is unchanged."""
    save_weights(make(other, 5), tmp_path / "w", "other")
    model = make(TINY, 3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="contains weights of other, which do not fit this model"):
        load_weights_except_head(model, tmp_path / "w")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_head_without_a_layer_for_the_classes(tmp_path: Path) -> None:
    """A head of one's own whose classifier cannot be told is refused with the option that loads it."""
    own = Composition(depths=(1, 1), dims=(4, 8), head="tests.models.test_classifier:Constant")
    save_weights(make(own, 5), tmp_path / "w", "own")
    with pytest.raises(UserError, match=r"^init_head: .* no linear layer for its classes; give init_head=same$"):
        load_weights_except_head(make(own, 3), tmp_path / "w")
