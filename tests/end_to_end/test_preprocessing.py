"""Tests that networks are evaluated and trained with their own preprocessing unless the user gives another."""

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file, save_model
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import train
import validate
from metaformer.data.plan.plan import TrainingPlan
from metaformer.errors import UserError
from metaformer.models import create_model, save_weights
from tests.conftest import QUICK, launch

Run = Callable[..., dict[str, Any]]
CLASSES, IMAGES_PER_CLASS = 8, 4
DEFAULT_SIZE_OPTIONS = (
    *(option for option in QUICK if not option.startswith("image_size")),
    "workers=0",
    "eval_batch_size=101",
)
# They differ in size, test size, crop, filter, mean and standard deviation, and in whether the size is fixed.
NETWORKS = (
    "efficientnet_lite0", "tf_efficientnet_lite0", "resnet18.a2_in1k", "resnet18.tv_in1k", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "inception_v3", "convnext_atto", "mobilenetv3_small_050", "mixer_s32_224",
    "mobilevit_xxs", "tinynet_e", "lcnet_035", "test_resnet", "test_vit",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 JPEGs of many sizes in 8 classes: smooth colours, edges and fine texture, so that crop and filter matter."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for number in range(CLASSES * IMAGES_PER_CLASS):
        width, height = (int(side) for side in rng.integers(150, 420, 2))
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64)
        y, x = np.mgrid[:height, :width]
        stripes = 60 * np.sign(np.sin(x / rng.uniform(1, 9) + y / rng.uniform(1, 9)))[..., None]
        pixels = np.clip(smooth + stripes + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
        file = root / "val" / f"class_{number % CLASSES}" / f"{number:02}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=95)
    return root


def timm_batch(photos: Path, data_config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return all images as timm's evaluation prepares them, and their labels."""
    data = ImageFolder(str(photos / "val"), create_transform(**data_config, is_training=False))
    (batch,) = DataLoader(data, batch_size=len(data))
    return tuple(batch)


def sensitive_network(name: str, photos: Path) -> tuple[nn.Module, dict[str, float]]:
    """Return a random network whose logits differ between images, and its results in timm's evaluation."""
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=CLASSES)
    data_config = resolve_data_config(model=model, use_test_size=True)
    images, labels = timm_batch(photos, data_config)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # the mean over all batches
        model.train()(images)
        model.eval()
        head = model.get_classifier()
        nn.init.normal_(head.weight)
        nn.init.zeros_(head.bias)
        logits = model(images)
        scale = 2 / logits.std(0).mean()
        head.weight.mul_(scale)
        head.bias.copy_(-scale * logits.mean(0))
        logits = model(images)
        best = logits.topk(5).indices == labels[:, None]
        expected = {
            "top1": 100 * best[:, 0].float().mean().item(),
            "top5": 100 * best.any(1).float().mean().item(),
            "loss": cross_entropy(logits, labels).item(),
        }
    return model, expected


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_equals_timms(photos: Path, tmp_path: Path, run_program: Run, name: str) -> None:
    """Without preprocessing options, validate.py gives timm's results to four digits and reports the preprocessing."""
    model, expected = sensitive_network(name, photos)
    save_model(model, str(tmp_path / "w.safetensors"))
    data_config = resolve_data_config(model=model, use_test_size=True)
    command = ("model=timm", f"model.name={name}", f"data.root={photos}", f"checkpoint={tmp_path / 'w.safetensors'}")
    table = tmp_path / "results.csv"
    found = run_program("validate", *command, "workers=0", "loader=pil", f"results_csv={table}")
    assert {figure: found[figure] for figure in expected} == pytest.approx(expected, rel=1e-4)
    assert found["image_size"] == data_config["input_size"][-1]
    assert (found["mean"], found["std"]) == (list(data_config["mean"]), list(data_config["std"]))
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["crop_pct"], row["interpolation"]) == (str(data_config["crop_pct"]), data_config["interpolation"])
    assert [float(value) for value in row["mean"].split()] == list(data_config["mean"])
    assert [float(value) for value in row["std"].split()] == list(data_config["std"])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "tinynet_e"])  # a bilinear and two bicubic resizes
def test_every_loader_is_close_to_timm(photos: Path, tmp_path: Path, run_program: Run, name: str) -> None:
    """The fast loaders, whose pixels differ slightly from PIL's, give nearly timm's loss."""
    model, expected = sensitive_network(name, photos)
    save_model(model, str(tmp_path / "w.safetensors"))
    command = ("model=timm", f"model.name={name}", f"data.root={photos}", f"checkpoint={tmp_path / 'w.safetensors'}")
    for loader in ("torch", "dali"):
        found = run_program("validate", *command, "workers=1", f"loader={loader}")
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.03), loader


def test_given_values_take_precedence(photos: Path, tmp_path: Path, run_program: Run) -> None:
    """Each preprocessing field changes the evaluation as it does in timm."""
    model, expected = sensitive_network("test_resnet", photos)
    save_model(model, str(tmp_path / "w.safetensors"))
    command = (
        "model=timm", "model.name=test_resnet", f"data.root={photos}", f"checkpoint={tmp_path / 'w.safetensors'}",
        "workers=0", "loader=pil",
    )  # fmt: skip
    own = resolve_data_config(model=model, use_test_size=True)
    for override, field, value in (
        ("image_size=128", "input_size", (3, 128, 128)),
        ("model.crop_pct=0.7", "crop_pct", 0.7),
        ("model.interpolation=bicubic", "interpolation", "bicubic"),
        ("model.mean=[0.4,0.4,0.4]", "mean", (0.4, 0.4, 0.4)),
        ("model.std=[0.3,0.2,0.3]", "std", (0.3, 0.2, 0.3)),
    ):
        images, labels = timm_batch(photos, own | {field: value})
        with torch.inference_mode():
            loss = cross_entropy(model(images), labels).item()
        found = run_program("validate", *command, override)["loss"]
        assert found == pytest.approx(loss, rel=1e-4), override
        assert found != pytest.approx(expected["loss"], rel=1e-3), override


def test_weight_names_select_the_preprocessing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unsupported crop mode, an unknown tag and weights of another tag give one line that names the field."""

    for split in ("train", "val"):  # which are looked for first
        (tmp_path / split).mkdir()

    def message(*overrides: str) -> str:
        (tmp_path / "w").write_bytes(b"not read: the network is refused first")
        command = ["validate.py", "model=timm", f"data.root={tmp_path}", f"checkpoint={tmp_path / 'w'}", *overrides]
        return error_of(monkeypatch, "validate", command)

    squash = "model.name=vit_so150m2_patch16_reg1_gap_448"
    assert message(squash).startswith("model.crop_mode: timm evaluates vit_so150m2_patch16_reg1_gap_448 with squash")
    assert message(squash, "model.crop_mode=center").startswith("data.root"), "the crop is accepted"
    assert message("model.name=deepseek_vit_412m_enc").startswith("model.crop_mode: timm evaluates")
    assert message("model.name=vit_large_patch16_sapiens2").startswith("image_size: timm's vit_large_patch16_sapiens2")
    assert message("model.name=resnet18.a9_in1k").startswith("model.name=resnet18.a9_in1k: unknown; did you mean")
    other = message("model.name=resnet18.a2_in1k", "checkpoint=hf:timm/resnet18.tv_in1k")
    assert other.startswith("model.name=resnet18.a2_in1k: conflicts with hf:timm/resnet18.tv_in1k; set")
    assert message("model.name=resnet18", "model.interpolation=random").startswith("model.interpolation")


def training_test_resnet(images: Path, run_dir: Path) -> tuple[str, ...]:
    """Return options that train timm's test_resnet at its default size."""
    network = ("model=timm", "model.name=test_resnet")
    return (*DEFAULT_SIZE_OPTIONS, f"data.root={images}", *network, f"run_dir={run_dir}", "epochs=1")


def test_training_uses_the_networks_preprocessing(
    images: Path, tmp_path: Path, run_program: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timm network is trained with its own size, mean and std, which the run logs and stores."""
    run_dir = tmp_path / "run"
    command = training_test_resnet(images, run_dir)
    plans: list[TrainingPlan] = []

    def keep(**values: Any) -> TrainingPlan:
        plans.append(TrainingPlan(**values))
        return plans[-1]

    monkeypatch.setattr(sys.modules["metaformer.assembly.plan"], "TrainingPlan", keep)
    run_program("train", *command, "max_steps=1")
    assert (plans[0].image_size, plans[0].crop_pct, plans[0].bicubic) == (160, 0.95, False)
    assert plans[0].fill == (128, 128, 128), "RandAugment fills with the mean, as in timm"
    log = (run_dir / "log.txt").read_text()
    assert " images       160 px, evaluated with crop 0.95 (bilinear)\n" in log
    assert " images       mean 0.5 0.5 0.5, std 0.5 0.5 0.5\n" in log
    text = (run_dir / "config.yaml").read_text()
    assert all(line in text for line in ("image_size: 160\n", "  crop_pct: 0.95\n", "  interpolation: bilinear\n"))
    assert "  mean:\n  - 0.5\n  - 0.5\n  - 0.5\n" in text
    identity = json.loads((run_dir / "checkpoints" / "last" / "manifest.json").read_text())["identity"]
    assert (identity["image_size"], identity["model.mean"]) == (160, [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("own", "name"),
    [({"mean": (0.4, 0.4, 0.4)}, "model.mean"), ({"input_size": (3, 128, 128)}, "image_size"),
     ({"interpolation": "bicubic"}, "model.interpolation"), ({"crop_pct": 0.8}, "model.crop_pct")],
)  # fmt: skip
def test_another_timm_version_does_not_change_a_run(
    images: Path, tmp_path: Path, run_program: Run, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], name: str
) -> None:
    """If timm's value for a network changes, a resume is rejected with the field's name; the old value resumes."""
    run_dir = tmp_path / "run"
    command = training_test_resnet(images, run_dir)
    run_program("train", *command, "max_steps=1")
    registered = timm.models._registry._model_pretrained_cfgs
    cfg = timm.get_pretrained_cfg("test_resnet")
    for field, value in own.items():
        setattr(cfg, field, value)
    for key in [key for key in registered if key.split(".")[0] == "test_resnet"]:
        monkeypatch.setitem(registered, key, cfg)
    message = error_of(monkeypatch, "train", ["train.py", *command, "max_steps=2"])
    assert f"cannot resume: it was trained with {name}=" in message
    kept = {"model.mean": "[0.5,0.5,0.5]", "image_size": 160, "model.interpolation": "bilinear", "model.crop_pct": 0.95}
    run_program("train", *command, "max_steps=2", f"{name}={kept[name]}")


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with EMA of a MetaFormer at 32 px, with custom preprocessing."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    own = ("image_size=32", "model.crop_pct=0.8", "model.interpolation=bilinear", "model.mean=[0.4,0.5,0.6]")
    done = launch("train", *QUICK, *own, f"data.root={images}", "epochs=1", "ema=enabled", "ema.decay=0.5",
                  "model=metaformer_s12_identity", f"run_dir={run_dir}", "max_steps=6")  # fmt: skip
    assert done.code == 0, done.stderr
    return run_dir


def without_records(run: Path, copy: Path) -> Path:
    """Copy a run, with weights files as earlier versions wrote them."""
    shutil.copytree(run, copy, symlinks=True)
    for file in copy.glob("checkpoints/*-*/*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", "model": "metaformer_s12_identity"})
    return copy


def test_a_run_is_evaluated_as_it_was_trained(images: Path, trained: Path, tmp_path: Path) -> None:
    """A run folder, its checkpoint and its weights file bring network and preprocessing, and give the run's loss.

    So does a copy of the file elsewhere, from its own record, and a run of an earlier version, from its config.yaml.
    """
    last = trained / "checkpoints" / "last"
    logged = json.loads((last / "manifest.json").read_text())["progress"]["last_validation"]
    command = (f"data.root={images}", "eval_batch_size=32", "workers=1")
    shutil.copy(last / "model.safetensors", tmp_path / "copy.safetensors")
    earlier = without_records(trained, tmp_path / "earlier")
    for place in (trained, last.resolve(), last / "model.safetensors", tmp_path / "copy.safetensors", earlier):
        done = launch("validate", *command, f"checkpoint={place}")
        assert done.code == 0, done.stderr
        assert done.result["loss"] == pytest.approx(logged["loss"], rel=1e-6), place
        lines = done.stderr.splitlines()
        assert "images       32 px, evaluated with crop 0.8 (bilinear)" in lines
        assert "images       mean 0.4 0.5 0.6, std 0.229 0.224 0.225" in lines
        assert "was trained with" not in done.stderr
        has_ema = place != tmp_path / "copy.safetensors"
        assert ("weights      use_ema=true takes the averaged ones in ema.safetensors" in lines) == has_ema


def test_values_that_differ_from_the_run_are_reported(images: Path, trained: Path) -> None:
    """A given value takes precedence and is reported with the run's; other values are the run's; two ranks agree."""
    command = (f"data.root={images}", "workers=1", f"checkpoint={trained}")
    given = ("image_size=64", "model.crop_pct=0.8", "model.interpolation=bicubic", "use_ema=true")
    done = launch("validate", *command, *given, ranks=2)
    assert done.code == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "was trained with" in line] == [
        f"image_size=64: {trained} was trained with 32",
        f"model.interpolation=bicubic: {trained} was trained with bilinear",
    ]
    assert (done.result["image_size"], done.result["crop_pct"], done.result["interpolation"]) == (64, 0.8, "bicubic")
    assert done.result["mean"] == [0.4, 0.5, 0.6]
    assert "use_ema=true" not in done.stderr


def test_another_network_than_the_runs_is_rejected(
    images: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error for a run of another network names the right model=; a broken config.yaml is named."""
    for run in (trained, without_records(trained, tmp_path / "run")):
        command = ["validate.py", f"data.root={images}", f"checkpoint={run}"]
        message = error_of(monkeypatch, "validate", [*command, "model=poolformer_s12"])
        assert message == (
            f"model=poolformer_s12: {run} is of metaformer_s12_identity; leave model= out, "
            "or give model=metaformer_s12_identity"
        )
    (tmp_path / "run" / "config.yaml").write_text("model: {name: x, library: y}\nimage_size: 32\n")
    message = error_of(monkeypatch, "validate", [*command, f"checkpoint={tmp_path / 'run'}"])
    assert message.startswith(f"{tmp_path / 'run' / 'config.yaml'}: not the configuration of a run (")


def test_own_networks_use_the_papers_crop(images: Path, tmp_path: Path, run_program: Run) -> None:
    """PoolFormer-S12 uses 224 px and 0.9; model.name= alone selects 0.95 for a network that needs it."""
    for name, crop_pct in (("poolformer_s12", 0.9), ("metaformer_s12_pppa", 0.95)):
        save_weights(create_model(name, num_classes=4), tmp_path / name, name)
        few = ("data.val_split=train", "data.train_split=null", "loader=torch", "workers=1", "eval_batch_size=48")
        found = run_program(
            "validate", f"data.root={images}", f"model.name={name}", f"checkpoint={tmp_path / name}", *few
        )
        assert (found["image_size"], found["crop_pct"], found["interpolation"]) == (224, crop_pct, "bicubic")
        assert found["mean"] == [0.485, 0.456, 0.406]
        assert math.isfinite(found["loss"])


def test_classes_without_images_are_rejected(images: Path, tmp_path: Path, run_program: Run,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """num_classes=1000 with four class folders needs allow_unused_classes=true; the network then has 1000 outputs."""
    command = (
        *QUICK,
        f"data.root={images}",
        "num_classes=1000",
        "max_steps=1",
        "epochs=1",
        f"run_dir={tmp_path / 'r'}",
        "workers=0",
    )
    message = error_of(monkeypatch, "train", ["train.py", *command])
    assert message.startswith("num_classes=1000: ")
    assert "has 4 classes; leave it null" in message
    assert message.endswith("allow_unused_classes=true to keep outputs without images")
    run_program("train", *command, "allow_unused_classes=true")
    assert "1000 classes" in (tmp_path / "r" / "log.txt").read_text()


def test_a_resume_reports_changes(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Changes of lr, schedule, weight decay, augmentation, precision and length are logged and stored with the step."""
    run_dir = tmp_path / "run"
    command = (*QUICK, f"data.root={images}", "model=timm", "model.name=test_resnet", f"run_dir={run_dir}", "workers=0")
    run_program("train", *command, "epochs=3", "max_steps=2")
    changed = ("optimizer.lr=2e-3", "optimizer.weight_decay=0.1", "schedule=cosine_per_step", "precision=bf16",
               "augmentation.erase_probability=0", "epochs=4", "max_steps=3")  # fmt: skip
    run_program("train", *command, *changed)
    logged = [line.split("changed", 1)[1].strip() for line in (run_dir / "log.txt").read_text().splitlines()
            if " changed " in line]  # fmt: skip
    assert {"optimizer.lr: 0.001 -> 0.002", "optimizer.weight_decay: 0.05 -> 0.1", "precision.name: fp32 -> bf16",
            "schedule.unit: epoch -> step", "augmentation.erase_probability: 0.25 -> 0.0", "epochs: 3 -> 4",
            } <= set(logged)  # fmt: skip
    (entry,) = map(json.loads, (run_dir / "changes.jsonl").read_text().splitlines())
    assert (entry["step"], entry["changes"]["optimizer.lr"]) == (2, [0.001, 0.002])
    assert set(entry) == {"step", "time", "changes"}
    assert len(logged) == len(entry["changes"])


def error_of(monkeypatch: pytest.MonkeyPatch, program: str, command: list[str]) -> str:
    """Run a program in this process and return its error message."""
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError) as caught:
        {"train": train.main, "validate": validate.main}[program]()
    assert "\n" not in str(caught.value)
    return str(caught.value)
