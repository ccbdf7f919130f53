"""Tests of validate.py on ImageNet's test sets in their own layouts, against timm and numpy."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet, create_transform
from torch import nn

from metaformer.data.index.config import ClassSubset
from metaformer.data.index.labels import subset_mask
from metaformer.models import create_model, save_weights
from tests.conftest import launch
from tests.end_to_end.test_bad_input import error_of

Run = Callable[..., dict[str, Any]]

WNIDS: list[str] = ImageNetInfo().label_names()
LABELS_IN_A = [6, 11, 13, 27]
LABELS_IN_R = [1, 2, 11, 13]
FAVOURED = [*LABELS_IN_A, *LABELS_IN_R, 0, 2, 10, 999]
TEST_SETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_real")
QUICK = ("image_size=32", "eval_batch_size=8", "workers=1", "loader=pil")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """An untrained PoolFormer-S12 whose predictions differ between images, mostly among a few classes."""
    torch.manual_seed(0)
    model = create_model("poolformer_s12").eval()
    head: Any = model.head
    with torch.no_grad():
        head.fc.weight.normal_(std=0.1)
        head.fc.weight[FAVOURED] *= 12
    return model


@pytest.fixture(scope="module")
def weights(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of the model."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model, path, "poolformer_s12")
    return path


def write_images(folder: Path, names: Sequence[str]) -> list[Path]:
    """Write a JPEG with a random colour and noise for each name."""
    files = []
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, 3) * rng.random() + rng.integers(0, 100, (45, 50 + number % 9, 3))
        files.append(folder / name)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1], format="JPEG")
    return files


def logits_of(model: nn.Module, files: Sequence[Path]) -> NDArray[np.float64]:
    """Return float64 logits [N, 1000] of images prepared by timm."""
    prepare = create_transform(
        32,
        is_training=False,
        interpolation="bicubic",
        crop_pct=0.9,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    with torch.inference_mode():
        images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
        logits: NDArray[np.float64] = model(images).double().numpy()
    return logits


def expected(logits: NDArray[np.float64], labels: Sequence[int], competing: NDArray[np.bool_]) -> dict[str, float]:
    """Return accuracy and loss among the competing classes, computed with numpy."""
    logits = np.where(competing, logits, -np.inf)
    order = np.argsort(-logits, axis=1)
    right = order == np.array(labels)[:, None]
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    top1, top5 = 100 * right[:, 0].mean(), 100 * right[:, :5].any(1).mean()
    return {"top1": top1, "top5": top5, "loss": loss.mean(), "images": len(labels)}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("imagenet_v2", [0, 2, 10, 999]),
        ("imagenet_a", LABELS_IN_A),
        ("imagenet_r", LABELS_IN_R),
        ("imagenet_sketch", [1, 11, 13, 999]),
    ],
)
def test_labels_and_classes_of_each_set(
    tmp_path: Path, model: nn.Module, weights: Path, run_program: Run, name: str, labels: list[int]
) -> None:
    """Class folders directly in data.root get ImageNet's labels; on A and R only their 200 classes compete."""
    folders = [str(label) if name == "imagenet_v2" else WNIDS[label] for label in labels]
    files = write_images(tmp_path / "set", [f"{folders[i % 4]}/{i}.jpeg" for i in range(40)])
    competing = subset_mask(ClassSubset(name)) if name in ("imagenet_a", "imagenet_r") else np.ones(1000, np.bool_)
    logits, targets = logits_of(model, files), [labels[i % 4] for i in range(40)]
    table = tmp_path / "table.csv"
    result = run_program(
        "validate",
        f"checkpoint={weights}",
        f"data={name}",
        f"data.root={tmp_path / 'set'}",
        f"results_csv={table}",
        *QUICK,
    )
    reference = expected(logits, targets, competing)
    assert {key: result[key] for key in reference} == pytest.approx(reference, rel=1e-4)
    assert 0 < reference["top1"] < reference["top5"]
    unrestricted = expected(logits, targets, np.ones(1000, np.bool_))
    assert (reference["top1"] != unrestricted["top1"]) == (not competing.all())
    assert (result["data"], result["classes"]) == (name, 4)
    assert result["expected_classes"] == competing.sum()
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["data"], row["images"], row["checkpoint"]) == (name, "40", str(weights))


def test_real_labels_at_any_world_size(tmp_path: Path, model: nn.Module, weights: Path) -> None:
    """On 1 and 2 ranks the accuracy equals timm's RealLabelsImagenet; an incomplete set gives a warning."""
    every_name = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 50_001)]
    sets: dict[str, list[int]] = RealLabelsImagenet(every_name).real_labels
    files = write_images(tmp_path, [f"{i}.JPEG" for i in range(40)])
    logits = logits_of(model, files)
    names: list[str] = []
    for i, best in enumerate(
        np.argsort(-logits, axis=1)[:, :5].tolist()
    ):  # choose a name with suitable labels for each image
        suits = (
            lambda labels, best=best: len(labels) > 1 and best[0] in labels,  # top-1 correct, with several labels
            lambda labels, best=best: best[0] not in labels and best[2] in labels,  # only top-5 correct
            lambda labels: not labels,  # not scored
            lambda labels, best=best: labels and not set(best) & set(labels),  # wrong
        )[i % 4]
        names.append(next(name for name, labels in sets.items() if suits(labels) and name not in names))
        (tmp_path / "val" / WNIDS[i % 3]).mkdir(parents=True, exist_ok=True)
        files[i].rename(tmp_path / "val" / WNIDS[i % 3] / names[i])
    reference = RealLabelsImagenet(names + [name for name in every_name if name not in names])
    reference.add_result(torch.from_numpy(logits))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = np.mean([-np.log(probabilities[i, sets[name]].sum()) for i, name in enumerate(names) if sets[name]])
    classes = len({label for name in names for label in sets[name]})
    for ranks in (1, 2):
        command = (f"checkpoint={weights}", "data=imagenet_real", f"data.root={tmp_path}", *QUICK)
        done = launch("validate", *command, ranks=ranks)
        assert done.code == 0, done.stderr
        result = done.result
        assert (result["top1"], result["top5"]) == pytest.approx((reference.get_accuracy(1), reference.get_accuracy(5)))
        assert (result["top1"], result["top5"]) == pytest.approx((100 / 3, 200 / 3))
        assert result["loss"] == pytest.approx(loss, rel=1e-4)
        assert (result["images"], result["classes"], result["expected_images"]) == (30, classes, 46_837)
        (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert f"30 images of {classes} classes" in warning
        assert "46,837 of 1,000" in warning


@pytest.mark.parametrize("name", TEST_SETS)
def test_missing_root_and_training(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each set's root comes from its variable; train.py rejects the set before it looks for the root."""
    variable = "IMAGENET_DIR" if name == "imagenet_real" else f"{name.upper()}_DIR"
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    message = error_of(monkeypatch, "validate", f"checkpoint={weights}", f"data={name}", *QUICK)
    assert f"data.root={tmp_path / 'nowhere'}: no folder {tmp_path / 'nowhere'}" in message
    assert "CLASS/*.JPEG" in message
    refused = error_of(monkeypatch, "train", f"data={name}", "tracking=local", f"run_dir={tmp_path / 'run'}")
    assert refused.startswith(f"data={name}: this test set has no training split")
    assert "validate.py" in refused
    assert list(tmp_path.iterdir()) == []


def test_wrong_folders_are_rejected(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names a parent folder, a class that is not in the set, a wnid in ImageNet-V2, or a class count."""
    write_images(tmp_path, [f"imagenet-a/{WNIDS[6]}/a.jpg", "imagenet-a/7/a.jpg"])
    common = (f"checkpoint={weights}", *QUICK)
    above = error_of(monkeypatch, "validate", *common, "data=imagenet_a", f"data.root={tmp_path}")
    assert f"class folder {tmp_path / 'imagenet-a'} is not named by one of imagenet_a's 200 wnids" in above
    root = f"data.root={tmp_path / 'imagenet-a'}"
    for name in ("imagenet_a", "imagenet_r", "imagenet_sketch"):
        assert f"class folder {tmp_path / 'imagenet-a' / '7'}" in error_of(
            monkeypatch, "validate", *common, f"data={name}", root
        )
    v2 = error_of(monkeypatch, "validate", *common, "data=imagenet_v2", root)
    assert f"{WNIDS[6]} is not named by a number from 0 to 999" in v2
    (tmp_path / "imagenet-a" / "7").rename(tmp_path / "imagenet-a" / WNIDS[11])
    count = error_of(monkeypatch, "validate", *common, "data=imagenet_a", root, "num_classes=200")
    assert count.startswith("num_classes=200: ")
    assert "1000 classes" in count


def test_no_training_split_is_needed(
    tmp_path: Path, model: nn.Module, weights: Path, monkeypatch: pytest.MonkeyPatch, run_program: Run
) -> None:
    """A val folder is enough; if it has fewer classes than the network, data.labels=wnids is needed."""
    files = write_images(tmp_path / "val", [f"{WNIDS[label]}/{label}.JPEG" for label in (1, 11, 999)])
    command = (f"checkpoint={weights}", f"data.root={tmp_path}", *QUICK)
    assert "head.fc" in error_of(monkeypatch, "validate", *command)
    message = error_of(monkeypatch, "validate", *command, "num_classes=1000")
    assert message.startswith("num_classes=1000: ")
    assert "3 class folders" in message
    result = run_program("validate", *command, "data.labels=wnids")
    reference = expected(logits_of(model, files), [1, 11, 999], np.ones(1000, np.bool_))
    assert {key: result[key] for key in reference} == pytest.approx(reference, rel=1e-4)
    assert "expected_images" not in result
