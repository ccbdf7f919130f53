"""Tests that user errors end in one line that names the field and the fix, before any training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train
import validate
from metaformer.errors import UserError
from metaformer.models import create_model, save_weights
from tests.conftest import QUICK, REPOSITORY, SMALL_NETWORK, launch


def error_of(monkeypatch: pytest.MonkeyPatch, program: str, *overrides: str) -> str:
    """Run a program in this process and return its error message."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *overrides])
    with pytest.raises(UserError) as caught:
        {"train": train.main, "validate": validate.main}[program]()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["epohcs=3"], ["epohcs", "epochs"]),
        (["model.nmae=x"], ["model.nmae", "model.name"]),
        (["model=poolformer_s21"], ["model=poolformer_s21", "poolformer_s12"]),
        (["model.name=poolformer_s21"], ["model.name=poolformer_s21", "poolformer_s12"]),
        (["model=timm"], ["model.name", "missing"]),
        (["model=timm", "model.name=resnet51"], ["model.name=resnet51", "resnet50"]),
        (["loader=dalli"], ["loader=dalli", "dali"]),
        (["loader.name=dalli"], ["loader.name", "dali"]),
        (["optimizer=adam2"], ["optimizer=adam2", "adamw"]),
        (["optimizer.name=adamww"], ["optimizer.name=adamww", "adamw"]),
        (["experiment=dmeo"], ["experiment=dmeo", "demo"]),
        (["experiment=ablation/rellu"], ["experiment=ablation/rellu", "ablation/relu"]),
        (["model.mean=[124,116,104]"], ["model.mean=", "[0, 1]"]),
        (["epochs=many"], ["epochs=many", "an integer"]),
        (["epochs=0"], ["epochs=0", "at least 1"]),
        (["data.root="], ["data.root=: has no value"]),
        (["run_dir="], ["run_dir=: has no value"]),
        (["image_size=16"], ["image_size=16", "32"]),
        (["global_batch_size=9", "accumulation_steps=2"], ["=9", "accumulation_steps=2", "multiple of 2"]),
        (["global_batch_size=9"], ["global_batch_size=9", "mixup", "even", "augmentation=light"]),
        (["augmentation.mix_group_size=6"], ["global_batch_size=8", "mix_group_size=6"]),
        (["model=metaformer_s12_batch_norm", "global_batch_size=2", "accumulation_steps=2", "augmentation=light"],
         ["global_batch_size=2:", "stages.3.blocks.0.norm1 (BatchNorm)", "image_size=32", "at least 4"]),
        (["global_batch_size=4096"], ["global_batch_size=4096", "48 images"]),
        (["precision=fp16"], ["precision=fp16", "CPU", "precision=fp32"]),
        (["num_classes=2"], ["num_classes=2", "4 classes"]),
        (["augmentation.flip_probability=2"], ["augmentation.flip_probability=2", "[0, 1]"]),
        (["init_weights=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["init_weights=nowhere.safetensors", "data.root=/nowhere"], ["data.root=/nowhere", "no folder"]),
        (["resume=nowhere"], ["resume=nowhere", "no such folder", "checkpoints/last"]),
        (["run_dir=/proc/nowhere"], ["run_dir=/proc/nowhere"]),
        (["tracking.name=a b\"c"], ["quote"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)  # fmt: skip
def test_one_line_names_the_field_and_the_fix(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], parts: list[str]
) -> None:
    """Each mistake is rejected with what is wrong and how to fix it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    message = error_of(monkeypatch, "train", f"data.root={images}", *QUICK, *overrides)
    for part in parts:
        assert part in message, message
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_a_data_set(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, empty, flat and half-empty folders, and splits with different classes, are named in the error."""

    def message() -> str:
        return error_of(monkeypatch, "train", f"data.root={tmp_path / 'data'}", *QUICK, f"run_dir={tmp_path / 'run'}")

    missing = message()
    assert str(tmp_path / "data" / "train") in missing
    assert "CLASS/*.JPEG" in missing
    assert "prepare_data.py" in missing
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert "empty" in message()
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "train" / "flat.JPEG")
    assert "no class folders" in message()
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(images, tmp_path / "data", ignore=shutil.ignore_patterns(".metaformer"))
    (tmp_path / "data" / "train" / "void").mkdir()
    assert "void" in message()
    (tmp_path / "data" / "train" / "void").rmdir()
    (tmp_path / "data" / "val" / "class_0").rename(tmp_path / "data" / "val" / "other")
    assert "class_0" in message()
    assert not (tmp_path / "run").exists()


def test_folder_beside_the_data_set(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder above the data set, a split and a class folder are answered with the folder to give."""

    def message(root: Path) -> str:
        return error_of(monkeypatch, "train", f"data.root={root}", *QUICK, f"run_dir={tmp_path / 'run'}")

    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "set").symlink_to(images)
    assert f"use data.root={tmp_path / 'above' / 'set'}" in message(tmp_path / "above")
    for inside in ("train", "val", "train/class_0"):
        assert f"use data.root={images}" in message(images / inside)
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train").symlink_to(images / "train")
    (tmp_path / "split" / "valid").symlink_to(images / "val")
    assert "add data.val_split=valid" in message(tmp_path / "split")


def test_imagenet_dir_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.root defaults to $IMAGENET_DIR, or to data/imagenet if that is not set; an empty one is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in error_of(monkeypatch, "train")
    monkeypatch.delenv("IMAGENET_DIR")
    assert "data/imagenet" in error_of(monkeypatch, "train")
    monkeypatch.setenv("IMAGENET_DIR", "")
    for program in ("train", "validate"):
        assert error_of(monkeypatch, program).startswith("data.root: empty; ")


def test_checkpoint_of_another_network(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of another network or class count, missing weights and half a file are rejected by name."""
    weights = tmp_path / "s12.safetensors"
    save_weights(create_model("poolformer_s12", num_classes=4), weights, "poolformer_s12")
    common = (f"data.root={images}", "image_size=32")
    other = error_of(monkeypatch, "validate", *common, "model=poolformer_s24", f"checkpoint={weights}")
    assert "poolformer_s12" in other
    assert str(weights) in other
    assert "has 4 classes" in error_of(monkeypatch, "validate", *common, "num_classes=7", f"checkpoint={weights}")
    assert "4 class folders" in error_of(monkeypatch, "validate", *common, "num_classes=3", f"checkpoint={weights}")
    seven = tmp_path / "seven.safetensors"
    save_weights(create_model("poolformer_s12", num_classes=7), seven, "poolformer_s12")
    assert "head.fc" in error_of(monkeypatch, "validate", *common, f"checkpoint={seven}")
    assert "checkpoint=" in error_of(monkeypatch, "validate", *common)
    assert "nowhere" in error_of(monkeypatch, "validate", *common, "checkpoint=nowhere")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in error_of(monkeypatch, "validate", *common, f"checkpoint={weights}")


def test_run_folder_of_another_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is not resumed with another network, seed or batch size, or with an EMA that it lacks.

    It is not reused with resume=never either.
    """
    common = (f"data.root={images}", *QUICK, f"run_dir={tmp_path / 'run'}", "max_steps=1")
    monkeypatch.setattr(sys, "argv", ["train.py", *common])
    train.main()
    for change in ("model=poolformer_s24", "seed=3", "global_batch_size=12", "ema=enabled"):
        assert "cannot resume" in error_of(monkeypatch, "train", *common, change)
    assert "resume=never" in error_of(monkeypatch, "train", *common, "resume=never")
    message = error_of(monkeypatch, "train", *common, f"run_dir={tmp_path / 'new'}", f"resume={tmp_path / 'run'}")
    assert "a run folder; give a checkpoint" in message


def test_run_folder_with_other_content(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set and a folder of runs are refused as run_dir and stay as they were; a launcher's log is accepted."""
    command = (f"data.root={images}", *QUICK, *SMALL_NETWORK, "max_steps=1")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "job.out").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", *command, f"run_dir={runs / 'one'}"])
    train.main()
    for folder, content in ((runs, "one"), (images, "train, val")):
        before = sorted(folder.iterdir())
        expected = f"run_dir={folder}: holds other folders ({content}) and no run; give a new or empty folder"
        assert error_of(monkeypatch, "train", *command, f"run_dir={folder}") == expected
        assert sorted(folder.iterdir()) == before
    assert "resume=never" in error_of(monkeypatch, "train", *command, f"run_dir={runs / 'one'}", "resume=never")


@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
def test_data_that_changed_since_the_start(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A run does not resume with a file added, removed or replaced; with the old data it does."""
    shutil.copytree(images, tmp_path / "data", ignore=shutil.ignore_patterns(".metaformer"))
    folder = tmp_path / "data" / "train" / "class_1"
    common = (f"data.root={tmp_path / 'data'}", *QUICK, f"run_dir={tmp_path / 'run'}")
    monkeypatch.setattr(sys, "argv", ["train.py", *common, "max_steps=1"])
    train.main()
    kept = shutil.copytree(folder, tmp_path / "kept")
    if change == "added":
        shutil.copy(folder / "005.JPEG", folder / "more.JPEG")
    elif change == "removed":
        (folder / "005.JPEG").unlink()
    else:
        Image.new("RGB", (40, 40)).save(folder / "005.JPEG")
    message = error_of(monkeypatch, "train", *common, "max_steps=2")
    assert "cannot resume: it was trained with data=" in message
    assert str(tmp_path / "run") in message
    shutil.rmtree(folder)
    kept.rename(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *common, "max_steps=2"])
    train.main()


UNPRIVILEGED = (  # drops root's right to read every file; other users do not have it
    ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
)


@pytest.mark.skipif(bool(UNPRIVILEGED) and shutil.which("setpriv") is None, reason="root may read everything")
@pytest.mark.parametrize(
    ("what", "loader"), [("class folder", "torch"), ("image", "torch"), ("image", "pil"), ("image", "dali")]
)
def test_unreadable_paths_are_named(images: Path, tmp_path: Path, what: str, loader: str) -> None:
    """A class folder or image without read permission gives one line with its path, with every loader."""
    shutil.copytree(images, tmp_path / "data", ignore=shutil.ignore_patterns(".metaformer"))
    closed = tmp_path / "data" / "train" / "class_1"
    closed = closed if what == "class folder" else closed / "005.JPEG"
    closed.chmod(0)
    options = (f"data.root={tmp_path / 'data'}", *QUICK, f"loader={loader}", f"run_dir={tmp_path / 'run'}")
    command = [*UNPRIVILEGED, sys.executable, str(REPOSITORY / "train.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    closed.chmod(0o755)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(closed) in line
    assert "Permission denied" in line
    assert (tmp_path / "run").exists() == (what == "image")


def test_bad_image_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training stops at a damaged file and names it."""
    shutil.copytree(images, tmp_path / "data")
    bad = tmp_path / "data" / "train" / "class_1" / "005.JPEG"
    bad.write_bytes(bad.read_bytes()[:100])
    command = (f"data.root={tmp_path / 'data'}", *QUICK, f"run_dir={tmp_path / 'run'}")
    assert str(bad) in error_of(monkeypatch, "train", *command)


@pytest.mark.parametrize(
    ("program", "overrides", "part"),
    [
        ("train", ("modle=poolformer_s12",), "modle"),
        ("train", ("global_batch_size=10", "accumulation_steps=5"), "global_batch_size=10"),
        ("train", ("precision=fp16",), "precision=fp16"),
        ("validate", ("checkpoint=nowhere",), "nowhere"),
    ],
)
def test_two_ranks_fail_together(images: Path, tmp_path: Path, program: str, overrides: tuple[str], part: str) -> None:
    """Under torchrun the error appears once, no rank hangs, and the only traceback is torchrun's own at the end."""
    quick = QUICK if program == "train" else ("image_size=32",)
    run_dir = (f"run_dir={tmp_path / 'run'}",) if program == "train" else ()
    done = launch(program, f"data.root={images}", *quick, *run_dir, *overrides, ranks=2, timeout=120)
    assert done.code != 0
    assert len(done.errors) == 1
    assert part in done.errors[0]
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
    assert not (tmp_path / "run").exists()


def test_exit_code_without_torchrun(tmp_path: Path) -> None:
    """With plain python the exit code is 2, and the error line is the only output."""
    done = launch("train", f"data.root={tmp_path}")
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == done.errors
