"""Tests of training and validating a network of the user's own, `model.target=package.module:Class`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from metaformer.models import create_model, create_target_model
from metaformer.models.classifier import classifier_names
from metaformer.models.record import read_record
from tests.conftest import QUICK

NETWORK = """
from pathlib import Path
from torch import nn

class Net(nn.Module):
    pretrained_cfg = {"classifier": "fc"}

    def __init__(self, num_classes, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))

def pooled(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

def text(num_classes):
    return "network"
"""
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, which is not on the path."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    (tmp_path / f"{name}.py").write_text(NETWORK)
    return name


@pytest.fixture
def train(images: Path, module: str, tmp_path: Path, run_program: Run) -> Run:
    """A function that trains the network for two steps."""

    def run(*overrides: str) -> dict[str, Any]:
        settings = (*QUICK, "workers=0", "max_steps=2", f"data.root={images}", f"run_dir={tmp_path / 'run'}")
        return run_program("train", *settings, f"model.target={module}:Net", *overrides)

    return run


def test_train_resume_and_validate(train: Run, module: str, run_program: Run, images: Path, tmp_path: Path) -> None:
    """The run, its resume and a validation make the same network; its name and options are recorded."""
    result = train("model.options.width=12")
    assert result["model"] == "Net"
    assert train("model.options.width=12")["loss"] == result["loss"]
    with pytest.raises(UserError, match=r'model.options={"width": 12}, this run has {"width": 13}'):
        train("model.options.width=13")

    record = read_record(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert record is not None
    assert (record.target, record.options) == (f"{module}:Net", {"width": 12})
    settings = (f"checkpoint={tmp_path / 'run'}", f"data.root={images}", "workers=0", "precision=fp32")
    validated = run_program("validate", *settings, f"model.target={module}:Net")
    assert validated["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_a_file_imports_nothing(train: Run, module: str, run_program: Run, images: Path, tmp_path: Path) -> None:
    """A network that only a checkpoint names is not imported: not to validate, to train, to teach, or from Python."""
    train()
    run, weights = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last" / "model.safetensors"
    del sys.modules[module]
    common = (f"data.root={images}", "workers=0", "precision=fp32")
    # A configuration of an own part makes the module importable, so that it would be found.
    mixer = ("model=metaformer", "model.token_mixers=[torch.nn:Identity]")
    other = (*QUICK, f"data.root={images}", f"run_dir={tmp_path / 'other'}")
    for program, overrides in (
        ("validate", (*common, f"checkpoint={run}")),
        ("validate", (*common, f"checkpoint={weights}")),
        ("train", (*other, f"init_weights={run}")),
        ("train", (*other, *mixer, f"distill.teacher={run}")),
    ):
        with pytest.raises(UserError, match=f"its network is {module}:Net, and code that only a file names is not"):
            run_program(program, *overrides)
    with pytest.raises(UserError, match="code that only a file names is not imported"):
        create_model(str(weights))
    with pytest.raises(UserError, match=rf"is of Net; give model.target={module}:Net"):
        run_program("validate", *common, f"checkpoint={run}", "model=poolformer_s12")
    assert module not in sys.modules


def test_a_new_head_and_frozen_parts(train: Run, module: str, tmp_path: Path) -> None:
    """The network starts from weights of its own, with a new head that it names, which alone trains."""
    train()
    start = f"init_weights={tmp_path / 'run'}"
    train(start, "init_head=new", "model.freeze=all_but_head", f"run_dir={tmp_path / 'second'}")
    assert "head         4 -> 4 classes, new" in (tmp_path / "second" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.options.wide=3",), "cannot be made with num_classes, wide ("),
        (("model=poolformer_s12",), "is a network of its own; leave model=poolformer_s12 out"),
        (("model.drop_path_rate=0.1",), "give model.options.drop_path_rate=0.1 if Net has it"),
        (("model.library=timm",), "is a network of its own"),
        (("model.target=null", "model.options.width=3"), "belongs to a network of your own; give model.target="),
        (("model.target=null", "model.library=target"), "belongs to a network of your own"),
        (("model.norm=layer_norm",), "model.norm=layer_norm: model=Net has its own parts"),
    ],
)
def test_options_that_do_not_fit(train: Run, overrides: tuple[str, ...], expected: str) -> None:
    """An option that the network does not accept ends in one line."""
    with pytest.raises(UserError) as caught:
        train(*overrides)
    assert expected in str(caught.value)


def test_what_is_no_network(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that makes something else, or other logits, is refused; one without a named head says so."""
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"makes str, which is not a torch.nn.Module"):
        create_target_model(f"{module}:text")
    with pytest.raises(UserError, match=r"makes \[2, 3\] of 2 images; must make logits of \[2, 5\]"):
        create_target_model(f"{module}:pooled", num_classes=5)
    with pytest.raises(UserError, match=r"fails for images of \[2, 3, 2, 2\]"):
        create_target_model(f"{module}:Net", num_classes=5, image_size=2)
    with pytest.raises(UserError, match=r"Sequential has no linear layer .* name it by pretrained_cfg = "):
        classifier_names(create_target_model(f"{module}:pooled", num_classes=3))
