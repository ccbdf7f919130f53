"""Weights of 21,841 classes as the start of a network with some of them."""

from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from metaformer.errors import UserError
from metaformer.models import create_model, save_weights
from metaformer.models.composition import Composition
from metaformer.models.pretraining import load_weights_of_21k
from metaformer.models.record import Record

TINY = Composition(depths=(1, 1), dims=(4, 8), head="mlp", downsampling_norm="layer_norm_without_bias")
ALL = ImageNetInfo("imagenet-22k").label_names()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny network with the classes of ImageNet-21K."""
    torch.manual_seed(0)
    model = create_model(TINY, num_classes=len(ALL))
    nn.init.normal_(model.head.fc.fc2.bias)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(model, path, Record("metaformer", composition=TINY))
    return path


def test_rows_follow_the_wnids(file: Path) -> None:
    """ImageNet-1K's classes take their rows in order; the one that ImageNet-21K lacks takes the mean of all."""
    wnids = ImageNetInfo().label_names()
    model = create_model(TINY, num_classes=1000)
    assert load_weights_of_21k(model, file, wnids) == ["n04399382"]
    whole = create_model(TINY, num_classes=len(ALL))
    assert load_weights_of_21k(whole, file, ALL) == []
    for name in ("weight", "bias"):
        found, source = (getattr(m.head.fc.fc2, name).detach() for m in (model, whole))
        for label, wnid in enumerate(wnids):
            expected = source.mean(0) if wnid == "n04399382" else source[ALL.index(wnid)]
            torch.testing.assert_close(found[label], expected)
    assert torch.equal(model.stem.conv.weight, whole.stem.conv.weight)


def test_other_classes_and_other_files(file: Path, tmp_path: Path) -> None:
    """Folders that are no wnids, and a file with another number of classes, are refused in one line."""
    model = create_model(TINY, num_classes=4)
    before = model.head.fc.fc2.weight.detach().clone()
    with pytest.raises(UserError, match=r"^init_head=from_21k: ImageNet-21K has no class class_0 .*named by wnids$"):
        load_weights_of_21k(model, file, ["class_0", *ALL[:3]])
    save_weights(create_model(TINY, num_classes=9), tmp_path / "nine", "tiny")
    with pytest.raises(UserError, match=r"nine: has 9 classes"):
        load_weights_of_21k(model, tmp_path / "nine", ALL[:4])
    assert torch.equal(model.head.fc.fc2.weight, before)
