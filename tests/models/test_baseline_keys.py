"""Weights of the second paper: the authors' keys and timm's, loaded strictly and written back."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from metaformer.errors import UserError
from metaformer.models import MetaFormer, create_model, load_weights, save_weights
from metaformer.models.config import ModelConfig
from metaformer.models.download import BASELINE_FILES, BASELINE_RELEASE, OFFICIAL_FILES, download_weights, weights_cache
from metaformer.models.families import BASELINES
from metaformer.models.preprocessing import resolve_preprocessing
from metaformer.models.weight_formats import check_complete, metaformer_to_official, official_to_metaformer
from scripts import convert_weights
from tests.models.released_baselines import DEPTHS, DIMS, MIXERS, baseline_logits, baseline_state
from tests.models.test_metaformer import randomise


def small(family: str, num_classes: int = 5) -> MetaFormer:
    """Return this project's network of a family, in the sizes of `baseline_state`."""
    size = "s18" if family in ("convformer", "caformer") else "s12"
    return create_model(replace(BASELINES[f"{family}_{size}"], depths=DEPTHS, dims=DIMS), num_classes, image_size=64)


@pytest.mark.parametrize("family", MIXERS)
def test_authors_weights_give_the_authors_function(tmp_path: Path, family: str) -> None:
    """A file with the authors' keys loads strictly and computes their function, in which every tensor takes part."""
    state = baseline_state(family)
    torch.save(state, tmp_path / "w.pth")
    model = small(family).eval()
    load_weights(model, tmp_path / "w.pth")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    leaves = {key: tensor.requires_grad_() for key, tensor in state.items()}
    expected = baseline_logits(family, leaves, images)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    gradients = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


@pytest.mark.parametrize("family", MIXERS)
def test_there_and_back(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """convert_weights.py writes safetensors that this project loads, and from them the authors' file, bit for bit."""
    state = baseline_state(family)
    torch.save(state, tmp_path / "in.pth")
    for source, out, target in (("in.pth", "ours", "timm"), ("ours", "back.pth", "official")):
        arguments = [str(tmp_path / source), str(tmp_path / out), "--to", target]
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments])
        convert_weights.main()
    load_weights(small(family), tmp_path / "ours")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in state.items()}
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", BASELINES)
def test_every_network_has_the_authors_keys(name: str) -> None:
    """Each network's state dict is complete, and is restored from the authors' keys; their file would load strictly."""
    with torch.device("meta"):
        state = dict(create_model(name).state_dict())
    check_complete(state)
    official = metaformer_to_official(state)
    assert not any(tensor.ndim == 4 and tensor.shape[2:] == (1, 1) for tensor in official.values())
    back = official_to_metaformer(official)
    assert {key: tensor.shape for key, tensor in back.items()} == {key: tensor.shape for key, tensor in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["poolformerv2_s12", "convformer_s18", "caformer_s18"])
def test_timms_files_both_ways(tmp_path: Path, name: str) -> None:
    """timm's file loads into this project and this project's file into timm, strictly, with equal logits."""
    theirs, ours = timm.create_model(name, num_classes=7).eval(), create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    randomise(theirs)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    load_weights(ours, tmp_path / "timm.safetensors")
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    randomise(ours.train())
    save_weights(ours.eval(), tmp_path / "ours.safetensors", name)
    theirs.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"stages.2.1.mlp.fc2.weight": None}, "stages.2.blocks.1.mlp.fc2.weight: missing"),
        ({"stages.2.1.res_scale2.scale": None}, "stages.2.blocks.1.res_scale2.scale: missing"),
        ({"downsample_layers.1.pre_norm.weight": None}, "stages.1.downsample.norm.weight: missing"),
        ({"head.fc2.bias": None}, "head.fc.fc2.bias: missing"),
        ({"norm.bias": None}, "head.norm.bias: missing"),
        ({"downsample_layers.1.post_norm.weight": "norm.bias"}, "downsample_layers.1.post_norm.weight: not a key"),
        ({"extra": "norm.bias"}, "extra: not a key"),
    ],
    ids=str,
)
def test_incomplete_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], part: str
) -> None:
    """A missing or an unknown tensor is named by the conversion and by loading; nothing is written."""
    state = baseline_state("caformer")
    for key, source in changed.items():
        if source is None:
            del state[key]
        else:
            state[key] = state[source]
    torch.save(state, tmp_path / "in")
    monkeypatch.setattr(
        sys, "argv", ["convert_weights.py", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "timm"]
    )
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        convert_weights.main()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=part.split(":")[0].replace(".", r"\.")):
        load_weights(small("caformer"), tmp_path / "in")


def test_names_of_the_authors_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """55 files, at the hub's address by family; weights of 384 px are evaluated at 384 px, all with crop 1."""
    assert len(BASELINE_FILES) == len(set(BASELINE_FILES)) == 15 + 8 * 5
    assert not set(BASELINE_FILES) & set(OFFICIAL_FILES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    urls = []

    def fetch(url: str, file: Path) -> None:
        urls.append(url)
        file.touch()

    monkeypatch.setattr("metaformer.models.download._fetch", fetch)
    monkeypatch.setattr("metaformer.models.download._check_complete", lambda file: None)
    assert download_weights("official:caformer_s18_384_in21ft1k") == weights_cache() / "caformer_s18_384_in21ft1k.pth"
    download_weights("official:identityformer_m48")
    assert urls == [
        f"{BASELINE_RELEASE}caformer/caformer_s18_384_in21ft1k.pth",
        f"{BASELINE_RELEASE}identityformer/identityformer_m48.pth",
    ]
    for weights, size in {
        "official:caformer_s18": 224,
        "official:caformer_s18_384": 384,
        "official:caformer_s18_384_in21ft1k": 384,
        "hf:timm/caformer_s18.sail_in22k_ft_in1k_384": 384,
        "runs/caformer_s18_384": 224,
    }.items():
        found = resolve_preprocessing(ModelConfig("caformer_s18"), None, weights, evaluation=True)
        assert (found.image_size, found.crop_pct) == (size, 1.0), weights
    with pytest.raises(UserError, match=r"did you mean .*official:caformer_s18_in21k"):
        download_weights("official:caformer_s18_in22k")
