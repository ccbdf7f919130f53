"""Test convert_weights.py, which converts between timm's and the authors' key layouts."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from metaformer.errors import UserError
from metaformer.models import create_model, download, load_weights, save_weights
from metaformer.models.config import Library
from metaformer.models.record import read_record
from scripts import convert_weights
from tests.local_server import Reply, serve
from tests.models.released import RELEASED_SLOTS, released_state
from tests.models.test_weights import small_released

Convert = Callable[..., str]


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Return a function that runs the script and returns its stdout."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        convert_weights.main()
        return capsys.readouterr().out

    return run


def refusal(convert: Convert, *arguments: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        convert(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[key]) for key, tensor in left.items())


@pytest.mark.parametrize("name", RELEASED_SLOTS)
def test_there_and_back(tmp_path: Path, convert: Convert, name: str) -> None:
    """Converting the authors' file to safetensors, which this project loads, and back gives the same bits."""
    state = released_state(name)
    torch.save(state, tmp_path / "in.pth.tar")
    printed = convert(tmp_path / "in.pth.tar", tmp_path / "ours.safetensors", "--to", "timm")
    values = sum(tensor.numel() for tensor in state.values())
    assert printed == (
        f"{tmp_path / 'ours.safetensors'}: {len(state)} tensors, {values:,} values, 5 classes, in timm's keys\n"
    )
    load_weights(small_released(name), tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth.tar", "--to", "official")
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    assert equal(back, state)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata()["model"] == str(tmp_path / "in.pth.tar")


def test_same_keys(tmp_path: Path, convert: Convert) -> None:
    """A file that already has the target's keys is written unchanged in the target's format."""
    state = released_state("poolformer_s12")
    torch.save(state, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "official", "--to", "official")
    assert equal(torch.load(tmp_path / "official", weights_only=True), state)
    save_weights(create_model("poolformer_s12", num_classes=3), tmp_path / "ours", "poolformer_s12")
    convert(tmp_path / "ours", tmp_path / "timm", "--to", "timm")
    assert equal(load_file(tmp_path / "timm"), load_file(tmp_path / "ours"))


def test_sources(tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """A released name, a timm training checkpoint with averaged weights, and a checkpoint folder can be converted."""
    state, average = released_state("poolformer_s12"), released_state("poolformer_s12", num_classes=6)
    torch.save(state, tmp_path / "w")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serve() as server:
        monkeypatch.setattr(download, "OFFICIAL_RELEASE", server.url)
        server.replies["/poolformer_s12.pth.tar"] = Reply((tmp_path / "w").read_bytes())
        convert("official:poolformer_s12", tmp_path / "named", "--to", "timm")
    assert torch.equal(load_file(tmp_path / "named")["head.fc.bias"], state["head.bias"])
    torch.save({"state_dict": state, "state_dict_ema": average}, tmp_path / "both")
    convert(tmp_path / "both", tmp_path / "averaged", "--to", "official", "--use-ema")
    assert equal(torch.load(tmp_path / "averaged", weights_only=True), average)
    (tmp_path / "epoch-001").mkdir()
    for file, weights in (("model", state), ("ema", average)):
        torch.save(weights, tmp_path / "epoch-001" / f"{file}.safetensors")
    assert "6 classes" in convert(tmp_path / "epoch-001", tmp_path / "from_folder", "--to", "timm", "--use-ema")


def test_existing_file_is_left_alone(tmp_path: Path, convert: Convert) -> None:
    """An existing OUT is refused before anything is read, and stays unchanged."""
    (tmp_path / "out").write_text("mine")
    text = refusal(convert, tmp_path / "nothing", tmp_path / "out", "--to", "timm")
    assert text == f"{tmp_path / 'out'}: already exists; give another name, or remove it"
    assert (tmp_path / "out").read_text() == "mine"


def test_not_a_network(tmp_path: Path, convert: Convert) -> None:
    """An incomplete network, another network and a file without weights give one-line errors; nothing is written."""
    state = released_state("poolformer_s12")
    source, out = tmp_path / "in", tmp_path / "out"
    arguments = (source, out, "--to", "official")
    torch.save({key: tensor for key, tensor in state.items() if key != "network.4.2.mlp.fc2.bias"}, source)
    assert "stages.2.blocks.2.mlp.fc2.bias: missing" in refusal(convert, *arguments)
    torch.save(state | {"dist_head.weight": torch.zeros(1)}, source)
    assert "dist_head.weight: not a key of a known network" in refusal(convert, *arguments)
    save_file({"layer1.0.conv1.weight": torch.zeros(1)}, source)
    assert f"{source}: not a complete network in a known layout: layer1.0.conv1.weight" in refusal(convert, *arguments)
    source.write_text("text")
    assert "neither safetensors nor torch's format" in refusal(convert, *arguments)
    assert f"IN={tmp_path / 'nothing'}: no file" in refusal(convert, tmp_path / "nothing", *arguments[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("target", ["timm", "official"])
def test_folder_that_cannot_be_written(tmp_path: Path, convert: Convert, target: str) -> None:
    """The error names OUT if its folder is missing."""
    torch.save(released_state("poolformer_s12"), tmp_path / "in")
    text = refusal(convert, tmp_path / "in", tmp_path / "no" / "out", "--to", target)
    assert text.startswith(f"{tmp_path / 'no' / 'out'}: cannot be written (")


def test_tensors_in_the_order_of_a_network_of_timm(tmp_path: Path, convert: Convert) -> None:
    """Another program's names give way to timm's; the record brings the network; another order is refused."""
    state = timm.create_model("test_resnet").state_dict()
    foreign = {f"_net{number}.{key.rpartition('.')[2]}": tensor for number, (key, tensor) in enumerate(state.items())}
    torch.save(foreign, tmp_path / "foreign.pth")
    options = ("--to", "timm", "--by-order", "test_resnet")
    printed = convert(tmp_path / "foreign.pth", tmp_path / "out.safetensors", *options)
    assert printed.endswith(" 1000 classes, in timm's keys\n")
    assert equal(load_file(tmp_path / "out.safetensors"), state)
    record = read_record(tmp_path / "out.safetensors")
    assert record is not None
    assert (record.name, record.library, record.num_classes) == ("test_resnet", Library.timm, 1000)

    for name, changed in (("reversed", dict(reversed(foreign.items()))), ("short", dict(list(foreign.items())[1:]))):
        torch.save(changed, tmp_path / f"{name}.pth")
        message = refusal(convert, tmp_path / f"{name}.pth", tmp_path / "no.safetensors", *options)
        assert "not a complete network in the order of timm's test_resnet: " in message
        assert not (tmp_path / "no.safetensors").exists()
    message = refusal(convert, tmp_path / "foreign.pth", tmp_path / "no", "--to", "timm", "--by-order", "resnet")
    assert message == "--by-order resnet: give the name of a network of timm, and --to timm"
