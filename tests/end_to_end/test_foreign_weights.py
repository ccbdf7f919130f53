"""Tests of validate.py and train.py with weights of timm and of the paper's authors, by path and by name."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import validate
from metaformer.errors import UserError
from metaformer.models import create_model, download, save_weights
from metaformer.models.weight_formats import metaformer_to_official
from tests.conftest import QUICK, REPOSITORY, launch, link_fewer_validation_images
from tests.local_server import Reply, Server, serve

Run = Callable[..., dict[str, Any]]
NAME, FILE = "official:poolformer_s12", "poolformer_s12.pth.tar"


@pytest.fixture(scope="module")
def few(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the training images and three validation images of each class."""
    return link_fewer_validation_images(images, tmp_path_factory.mktemp("few"), 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One four-class PoolFormer-S12 in this project's, the authors' and timm's formats, and another as timm's EMA."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    model, average = create_model("poolformer_s12", num_classes=4), create_model("poolformer_s12", num_classes=4)
    save_weights(model, folder / "ours", "poolformer_s12")
    save_weights(average, folder / "average", "poolformer_s12")
    torch.save(metaformer_to_official(model.state_dict()), folder / FILE)
    wrapped = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"arch": "x", "state_dict": wrapped, "state_dict_ema": average.state_dict()}, folder / "timm")
    return folder


@pytest.fixture
def server(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A local server for the authors' release, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serve() as server:
        monkeypatch.setattr(download, "OFFICIAL_RELEASE", server.url)
        server.replies[f"/{FILE}"] = Reply((files / FILE).read_bytes())
        yield server


def options(few: Path) -> tuple[str, ...]:
    return (f"data.root={few}", "image_size=32", "eval_batch_size=6", "workers=1")


def error_of(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    monkeypatch.setattr(sys, "argv", ["validate.py", *overrides])
    with pytest.raises(UserError) as caught:
        validate.main()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_format_gives_the_same_result(few: Path, files: Path, server: Server, run_program: Run) -> None:
    """The authors' file, by path and name, and timm's checkpoint and EMA give the result of this project's files."""
    expected = run_program("validate", *options(few), f"checkpoint={files / 'ours'}")
    for checkpoint in (str(files / FILE), NAME, str(files / "timm")):
        result = run_program("validate", *options(few), f"checkpoint={checkpoint}")
        assert result == expected | {"checkpoint": checkpoint}
    averaged = run_program("validate", *options(few), f"checkpoint={files / 'timm'}", "use_ema=true")
    expected = run_program("validate", *options(few), f"checkpoint={files / 'average'}")
    assert averaged["loss"] == expected["loss"] != result["loss"]


def test_training_starts_from_a_name(few: Path, files: Path, server: Server, tmp_path: Path, run_program: Run) -> None:
    """init_weights= accepts the same names; after one step at a tiny rate, the weights still equal the file's."""
    command = (*QUICK, f"data.root={few}", f"run_dir={tmp_path / 'run'}", "max_steps=1", "optimizer.lr=1e-9")
    run_program("train", *command, "optimizer.weight_decay=0", "schedule.warmup_epochs=0", f"init_weights={NAME}")
    trained = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    for key, tensor in load_file(files / "ours").items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=1e-4, msg=key)


def test_two_ranks_download_once(few: Path, server: Server, tmp_path: Path) -> None:
    """Under torchrun only one rank downloads the file, and both load it."""
    program = tmp_path / "validate_here.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import validate\nfrom metaformer.program import run_program\nfrom metaformer.models import download\n"
        f"download.OFFICIAL_RELEASE = {server.url!r}\n"
        "if __name__ == '__main__':  # workers import this file too\n    run_program(validate.main)\n"
    )
    done = launch(str(program.with_suffix("")), *options(few), f"checkpoint={NAME}", ranks=2)
    assert done.code == 0, done.stderr
    assert done.result["images"] == 12
    assert done.result["checkpoint"] == NAME
    assert server.requests == [f"GET /{FILE}"]
    assert done.stderr.count("downloading ") == 1


def test_network_of_timm(few: Path, tmp_path: Path, run_program: Run) -> None:
    """model=timm loads timm's training checkpoint after removing its wrapper."""
    model = timm.create_model("resnet10t", num_classes=4)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w")
    result = run_program(
        "validate", *options(few), "model=timm", "model.name=resnet10t", f"checkpoint={tmp_path / 'w'}"
    )
    assert result["images"] == 12


def test_rejected_weights(
    few: Path, files: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong class counts, networks and names, a missing EMA, and a failed download give one line with the fix."""

    def message(checkpoint: object, *overrides: str) -> str:
        return error_of(monkeypatch, *options(few), f"checkpoint={checkpoint}", *overrides)

    save_weights(create_model("poolformer_s12"), tmp_path / "imagenet", "poolformer_s12")
    classes = message(tmp_path / "imagenet")
    assert "has 1000 classes (head.fc.weight), but this model has 4; set num_classes=1000" in classes
    assert "which do not fit this model: missing stages.0.blocks.2." in message(NAME, "model=poolformer_s24")
    assert "checkpoint=official:poolformer: unknown; did you mean" in message("official:poolformer")
    for path in (files / "ours", files / FILE):
        assert "use_ema=true" in message(path, "use_ema=true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(download, "OFFICIAL_RELEASE", "http://nowhere.invalid/")
    text = message(NAME)
    assert text.startswith(f"checkpoint={NAME}: cannot get http://nowhere.invalid/{FILE} (")
    assert text.endswith("; download it by hand and give its path")
