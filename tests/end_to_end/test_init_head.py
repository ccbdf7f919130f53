"""init_head= through train.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from metaformer.errors import UserError
from metaformer.models import create_model, create_timm_model, save_weights
from metaformer.models.composition import Composition
from metaformer.models.config import Library
from metaformer.models.record import Record
from tests.conftest import QUICK, VAL_IMAGES

WNIDS = ("n01440764", "n02123045", "n03272010", "n04399382")  # of ImageNet-1K; ImageNet-21K does not have the last one
NETWORK = ("model=metaformer", "model.depths=[1,1]", "model.dims=[4,8]")


def test_training_starts_from_21841_classes(
    images: Path, tmp_path: Path, run_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of four classes trains from weights of 21,841; without the option, the classes do not fit."""
    root, file = tmp_path / "data", tmp_path / "w.safetensors"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for number, wnid in enumerate(WNIDS):
            (root / split / wnid).symlink_to(images / split / f"class_{number}")
    composition = Composition(depths=(1, 1), dims=(4, 8))
    save_weights(create_model(composition, num_classes=21841), file, Record("metaformer", composition=composition))
    assert len(ImageNetInfo("imagenet-22k").label_names()) == 21841
    warnings: list[str] = []
    monkeypatch.setattr("metaformer.assembly.initial_weights.warn", warnings.append)
    common = ("train", *NETWORK, f"data.root={root}", *QUICK, "max_steps=1", "workers=0", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match=r"^init_head=from_21k: nothing to convert; give init_weights too$"):
        run_program(*common, "init_head=from_21k")
    with pytest.raises(UserError, match="has 21841 classes"):
        run_program(*common, f"init_weights={file}", "init_head=same")
    result = run_program(*common, f"init_weights={file}", "init_head=from_21k")
    assert result["images"] == VAL_IMAGES
    assert warnings == [
        "init_head=from_21k: ImageNet-21K has no n04399382; the classifier's rows start at the mean of all"
    ]
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "init_head: from_21k" in config
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_new_head(images: Path, tmp_path: Path, run_program: Callable[..., Any]) -> None:
    """Another number of classes, or other names, give a new head, which a line says; else the head is kept.

    Everything else is loaded; a resume neither makes a new head nor says so.
    """
    composition = Composition(depths=(1, 1), dims=(4, 8))

    def start(name: str, num_classes: int, classes: tuple[str, ...] | None, *overrides: str) -> tuple[list[str], bool]:
        """Train a step at a tiny rate; return the log's lines about the head, and whether it is that of the file."""
        file, run_dir = tmp_path / f"{name}.safetensors", tmp_path / name
        record = Record("metaformer", composition=composition, num_classes=num_classes, classes=classes)
        model = create_model(composition, num_classes=num_classes)
        save_weights(model, file, record)
        common = ("train", *NETWORK, f"data.root={images}", *QUICK, "workers=0", f"run_dir={run_dir}",
                  "optimizer.lr=1e-9", "schedule.warmup_epochs=0", "optimizer.weight_decay=0")  # fmt: skip
        run_program(*common, f"init_weights={file}", "max_steps=1", *overrides)
        trained = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
        same = {key: trained[key].shape == value.shape and torch.allclose(trained[key], value, rtol=0, atol=1e-6)
                for key, value in model.state_dict().items()}  # fmt: skip
        assert all(same[key] for key in same if not key.startswith("head.fc")), same
        return [line.split(" head ")[1].strip() for line in (run_dir / "log.txt").read_text().splitlines()
                if " head  " in line], same["head.fc.weight"]  # fmt: skip

    folders = ("class_0", "class_1", "class_2", "class_3")
    assert start("more", 9, None) == (["9 -> 4 classes, new"], False)
    assert start("equal", 4, folders) == ([], True)
    assert start("unknown", 4, None) == ([], True)
    renamed = ["4 -> 4 classes, new", "the weights' classes have other names; init_head=same keeps them"]
    assert start("renamed", 4, ("a", "b", "c", "d")) == (renamed, False)
    assert start("kept", 4, ("a", "b", "c", "d"), "init_head=same") == ([], True)
    assert start("forced", 4, folders, "init_head=new") == (["4 -> 4 classes, new"], False)
    again = start("forced", 4, folders, "init_head=new", "max_steps=2")
    assert again == (["4 -> 4 classes, new"], False), "a resume says nothing more"
    with pytest.raises(UserError, match=r"has 9 classes \(head.fc.weight\), but this model has 4"):
        start("wrong", 9, None, "init_head=same")


def test_another_image_size(images: Path, tmp_path: Path, run_program: Callable[..., Any]) -> None:
    """Position embeddings are resampled, which a line says; validate.py and a resume take the run's size."""
    run_dir = tmp_path / "run"
    save_weights(create_timm_model("test_vit", 4), tmp_path / "w", Record("test_vit", Library.timm, num_classes=4))
    options = (f"data.root={images}", *QUICK, "workers=0", "model.drop_path_rate=null", f"run_dir={run_dir}")
    start = ("model=timm", "model.name=test_vit", f"init_weights={tmp_path / 'w'}", "image_size=64", "max_steps=2")
    run_program("train", *options, *start)
    lines = [line[20:] for line in (run_dir / "log.txt").read_text().splitlines()]
    assert "positions    pos_embed [1, 101, 64] -> [1, 17, 64], resampled" in lines
    result = run_program("validate", f"data.root={images}", f"checkpoint={run_dir}", "workers=0", "precision=fp32")
    assert (result["image_size"], result["images"]) == (64, VAL_IMAGES)
    run_program("train", *options, *start[:-1], "max_steps=3")
    assert (run_dir / "log.txt").read_text().count(" positions ") == 1
