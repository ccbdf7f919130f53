"""Weights bring their network, preprocessing and classes to train.py and validate.py."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from metaformer.assembly.adoption import adopt
from metaformer.composing import compose_training
from metaformer.errors import UserError
from metaformer.models import save_state
from metaformer.models.config import Library, ModelConfig
from metaformer.models.record import Record, named_record, read_record
from tests.conftest import QUICK

Run = Callable[..., dict[str, Any]]
TINY = ("model=metaformer", "model.depths=[1,1]", "model.dims=[4,8]", "model.drop_path_rate=0.2")


def train(run_program: Run, images: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    common = (f"data.root={images}", *QUICK, "workers=0", "max_steps=1", f"run_dir={run_dir}")
    return run_program("train", *common, *overrides)


def lines(run_dir: Path, label: str) -> list[str]:
    """Return what a run's log says under a label."""
    found = [line.split(f" {label} ", 1) for line in (run_dir / "log.txt").read_text().splitlines()]
    return [parts[1].strip() for parts in found if len(parts) == 2]


@pytest.mark.parametrize("network", [TINY, ("model=timm", "model.name=test_resnet")], ids=lambda value: value[0])
def test_a_run_brings_its_network(images: Path, tmp_path: Path, run_program: Run, network: tuple[str, ...]) -> None:
    """Without model=, evaluation and training take the run's network and preprocessing; given values win and are named.

    The same is true of a copy of its weights file.
    """
    first = tmp_path / "first"
    result = train(run_program, images, first, *network, "model.mean=[0.4,0.5,0.6]")
    copy = shutil.copy(first / "checkpoints" / "last" / "model.safetensors", tmp_path / "copy.safetensors")
    for place in (first, copy):
        found = run_program("validate", f"data.root={images}", "workers=0", f"checkpoint={place}")
        assert (found["model"], found["image_size"], found["mean"]) == (result["model"], 32, [0.4, 0.5, 0.6])
        assert (found["top1"], found["loss"]) == (result["top1"], pytest.approx(result["loss"], rel=1e-4))
    second = tmp_path / "second"
    train(run_program, images, second, f"init_weights={copy}", "image_size=64", "model.crop_pct=1.0",
          "optimizer.lr=1e-9")  # fmt: skip
    recorded, again = (read_record(run / "checkpoints" / "last" / "model.safetensors") for run in (first, second))
    assert recorded is not None
    assert again is not None
    assert recorded.images is not None
    assert again == replace(recorded, images=replace(recorded.images, image_size=64, crop_pct=1.0))
    crop_pct = recorded.images.crop_pct
    assert lines(second, "differs") == [
        f"image_size=64: {copy} was trained with 32", f"model.crop_pct=1.0: {copy} was trained with {crop_pct}"
    ]  # fmt: skip


def test_class_folders_are_matched_by_name(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Some of the classes are scored with their own labels; unknown ones are refused; order takes any names."""
    run = tmp_path / "run"
    whole = train(run_program, images, run, *TINY)
    other = tmp_path / "other"
    for number in range(4):
        shutil.copytree(images / "val" / f"class_{number}", other / "val" / f"kind_{number}")
    evaluate = ("validate", "workers=0", f"checkpoint={run}")
    parts = []
    for names in (("class_1", "class_3"), ("class_0", "class_2")):
        root = tmp_path / names[0]
        for name in names:
            (root / "val").mkdir(parents=True, exist_ok=True)
            (root / "val" / name).symlink_to(images / "val" / name)
        parts.append(run_program(*evaluate, f"data.root={root}"))
    assert [part["classes"] for part in parts] == [2, 2]
    count = sum(part["images"] for part in parts)
    for figure in ("top1", "loss"):
        mean = sum(part[figure] * part["images"] for part in parts) / count
        assert (count, mean) == (whole["images"], pytest.approx(whole[figure], rel=1e-4)), figure
    with pytest.raises(UserError, match=(
        r"^data\.root: .*val has the class kind_0 \(and 3 more\), which is none of the 4 classes of .*run "
        r"\(class_0, class_1, class_2, \.\.\.\); rename or remove its folder, or give match_classes=order"
    )):  # fmt: skip
        run_program(*evaluate, f"data.root={other}")
    found = run_program(*evaluate, f"data.root={other}", "match_classes=order")
    assert found["top1"] == whole["top1"]
    (other / "val" / "kind_3").rename(other / "val" / "class_3")
    with pytest.raises(UserError, match=r"has the class kind_0 \(and 2 more\)"):
        run_program(*evaluate, f"data.root={other}")


def test_records_that_name_only_the_network(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Files of earlier versions and released names bring a network; given networks are not contradicted by them."""
    run = tmp_path / "run"
    train(run_program, images, run, "model=timm", "model.name=test_resnet")
    state = load_file(run / "checkpoints" / "last" / "model.safetensors")
    save_state(state, tmp_path / "w", "test_resnet")
    given = ("model=timm", "model.name=test_resnet", "image_size=32")
    assert run_program("validate", f"data.root={images}", "workers=0", f"checkpoint={tmp_path / 'w'}", *given)["images"]
    with pytest.raises(UserError, match="contains weights of test_resnet, which do not fit this model"):
        run_program("validate", f"data.root={images}", "workers=0", f"checkpoint={tmp_path / 'w'}", "image_size=32")
    config = compose_training(["init_weights=official:poolformer_s12", "model=timm", "model.name=poolformer_s12"])
    adopted, notes = adopt(config, Record("poolformer_s12"), "official:poolformer_s12")
    assert (adopted, notes) == (config, [])


@pytest.mark.parametrize(
    ("weights", "model", "run_dir"),
    [
        ("official:poolformer_s24", "poolformer_s24", "runs/poolformer_s24-default"),
        ("official:metaformer_id_s12", "metaformer_s12_identity", "runs/metaformer_id_s12-default"),
        ("official:caformer_s18_384_in21ft1k", "caformer_s18", "runs/caformer_s18_384_in21ft1k-default"),
        ("hf:timm/resnet50.a1_in1k", "resnet50.a1_in1k", "runs/resnet50.a1_in1k-default"),
        ("hf:timm/caformer_s18.sail_in1k", "caformer_s18", "runs/caformer_s18.sail_in1k-default"),
        ("hf:someone/something", "poolformer_s12", "runs/something-default"),
        ("runs/flowers/", None, "runs/flowers-default"),
        ("runs/flowers/checkpoints/last/ema.safetensors", None, "runs/flowers-default"),
        ("weights/tulips.pth.tar", None, "runs/tulips-default"),
        ("tulips.safetensors", None, "runs/tulips-default"),
    ],
)
def test_names_of_weights(weights: str, model: str | None, run_dir: str) -> None:
    """A released name stands for a network; the run folder has the name of the weights."""
    config = compose_training([f"init_weights={weights}"])
    assert (config.model.name, config.run_dir) == ("auto", run_dir)
    found = adopt(config, named_record(weights), weights)[0].model
    assert found.name == (model or "poolformer_s12")
    assert (found.library is Library.timm) == (model == "resnet50.a1_in1k")
    assert compose_training([]).model == ModelConfig(name="poolformer_s12")
    assert (
        compose_training([f"init_weights={weights}", "model=poolformer_s36"]).run_dir == "runs/poolformer_s36-default"
    )
