"""Networks of one's own parts through train.py and validate.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metaformer.errors import UserError
from metaformer.models import create_model, load_weights
from metaformer.models.record import read_record
from metaformer.models.token_mixers import Attention
from tests.conftest import QUICK, rows

Run = Callable[..., dict[str, Any]]
OWN = (
    "model=metaformer", "model.depths=[1,1,2,1]", "model.dims=[16,16,32,32]",
    "model.token_mixers=[pooling,separable_conv,attention,attention]", "model.norm=layer_norm",
    "model.activation=star_relu", "model.residuals=[plain,plain,scaled,scaled]", "model.head=mlp",
    "model.head_dropout=0.1", "model.position_embedding_stage=2",
)  # fmt: skip
SHIFT = "tests.models.test_composition:Shift"


@pytest.fixture(scope="module")
def common(images: Path) -> tuple[str, ...]:
    """Options of a run that ends after two steps."""
    return (f"data.root={images}", *QUICK, "max_steps=2", "workers=0")


def described_parts(run_dir: Path) -> str:
    """Return the description of a network's parts in a run's log, without the wrapping of its lines."""
    lines = [line.partition(" parts ") for line in (run_dir / "log.txt").read_text().splitlines()]
    return " ".join(text.strip() for _, found, text in lines if found)


def test_a_network_of_parts_is_trained_described_and_rebuilt(
    common: tuple[str, ...], tmp_path: Path, run_program: Run, images: Path
) -> None:
    """It trains by name of its parts; validate.py and create_model make it again from the checkpoint alone."""
    run_dir = tmp_path / "run"
    trained = run_program("train", *common, *OWN, f"run_dir={run_dir}")
    log = (run_dir / "log.txt").read_text()
    assert "GMACs" in log
    assert "token_mixers pooling separable_conv attention attention" in described_parts(run_dir)
    assert len(rows(run_dir)) == 2
    evaluate = ("validate", "model=metaformer", f"data.root={images}", "image_size=32", "workers=0")
    again = run_program(*evaluate, f"checkpoint={run_dir}")
    assert (again["top1"], again["loss"]) == (trained["top1"], pytest.approx(trained["loss"], rel=1e-4))
    file = run_dir / "checkpoints" / "last" / "model.safetensors"
    (tmp_path / "alone.safetensors").write_bytes(file.read_bytes())
    alone = run_program(*evaluate, f"checkpoint={tmp_path / 'alone.safetensors'}", "model.norm=layer_norm")
    assert alone["loss"] == again["loss"]
    record = read_record(file)
    assert record is not None
    assert (record.name, record.num_classes, record.images and record.images.image_size) == ("metaformer", 4, 32)
    assert record.classes == ("class_0", "class_1", "class_2", "class_3")
    model = create_model(str(file), num_classes=4, image_size=32)
    load_weights(model, file)
    assert isinstance(model.stages[2].blocks[1].token_mixer, Attention)  # type: ignore[union-attr,index]
    state = load_file(file)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"^model\.norm=group_norm: .*was trained with layer_norm; remove the field"):
        run_program(*evaluate, f"checkpoint={run_dir}", "model.norm=group_norm")
    with pytest.raises(UserError, match=r"cannot resume: it was trained with model parts="):
        run_program("train", *common, *OWN, "model.activation=gelu", f"run_dir={run_dir}", "max_steps=3")


def test_parts_of_ones_own_are_not_imported_from_a_file(
    common: tuple[str, ...], tmp_path: Path, run_program: Run, images: Path
) -> None:
    """A token mixer outside the project trains; a checkpoint that names it loads only where the user names it too."""
    own = ("model=metaformer", "model.depths=[1,1]", "model.dims=[16,32]", f"model.token_mixers=[pooling,'{SHIFT}']")
    run_dir = tmp_path / "run"
    trained = run_program("train", *common, *own, f"run_dir={run_dir}")
    assert f"token_mixers pooling {SHIFT}" in described_parts(run_dir)
    evaluate = ("validate", "model=metaformer", f"data.root={images}", "image_size=32", "workers=0")
    with pytest.raises(UserError, match=rf"has the part {SHIFT}, and code that only a file names is not imported"):
        run_program(*evaluate, f"checkpoint={run_dir}")
    with pytest.raises(UserError, match="is not imported"):
        create_model(str(run_dir / "checkpoints" / "last" / "model.safetensors"))
    again = run_program(*evaluate, f"checkpoint={run_dir}", *own[1:])
    assert again["top1"] == trained["top1"]


def test_fields_that_are_not_given(common: tuple[str, ...], tmp_path: Path, run_program: Run) -> None:
    """A field that is not given has PoolFormer-S12's value, loss for loss."""
    small = ("model.depths=[1,1,1,1]", "model.dims=[8,16,24,32]")
    losses = {}
    for name, parts in {"given": ("model.token_mixers=[pooling]", "model.norm=group_norm"), "default": ()}.items():
        run_program("train", *common, "model=metaformer", *small, *parts, f"run_dir={tmp_path / name}")
        losses[name] = [row["loss"] for row in rows(tmp_path / name)]
    assert losses["given"] == losses["default"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model=metaformer", "model.depths=[2,2]"), "model.dims="),
        (("model=metaformer", "model.token_mixers=[pool]"), "model.token_mixers=pool: unknown; did you mean pooling"),
        (("model=metaformer", "model.norm=no_such:Norm"), "model.norm=no_such:Norm: cannot be imported"),
        (("model=metaformer", "model.norm='torch.nn:Softmax2d'"), "model=metaformer: cannot be made"),
        (("model=metaformer", "model.token_mixers=['torch.nn:Linear']"), "model=metaformer: cannot be made"),
        (("model=poolformer_s12", "model.norm=layer_norm"), "model.norm=layer_norm: model=poolformer_s12 has its own"),
        (("model=timm", "model.name=resnet18", "model.depths=[1]"), "model.depths=[1]: model=resnet18 has its own"),
        (("model=timm", "model.name=resnet18", "model.head_dropout=0.1"), "model.head_dropout=0.1: timm's"),
        (("model=poolformer_s12", "model.head_dropout=0.1"), "head_dropout=0.1: only the head `mlp`"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_impossible_networks_are_refused(
    common: tuple[str, ...], tmp_path: Path, run_program: Run, overrides: tuple[str, ...], expected: str
) -> None:
    """One line with the field, before a run folder exists."""
    with pytest.raises(UserError) as caught:
        run_program("train", *common, *overrides, f"run_dir={tmp_path / 'run'}")
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_is_refused(tmp_path: Path, images: Path, run_program: Run) -> None:
    """A file whose record of the network is no composition is named."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"composition": json.dumps({"norm": 3})})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"composition": '{"norm": 3}'}
    with pytest.raises(UserError, match=r"w\.safetensors: cannot read which network it is of \(norm=3"):
        run_program("validate", "model=metaformer", f"checkpoint={path}", f"data.root={images}", "image_size=32")
    with pytest.raises(UserError, match=r"w\.safetensors: cannot read"):
        create_model(str(path))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="does not record its network"):
        create_model(str(path))
