"""Folders for the hub: timm loads them, the card says what is known, and they are pushed to a server."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from metaformer.errors import UserError
from metaformer.models import create_model, create_timm_model, load_weights
from metaformer.models.config import Library, Preprocessing, ResizeFilter
from metaformer.models.export.exportable import Exportable
from metaformer.models.export.hub_folder import check_repository, push, write_hub_folder
from metaformer.models.export.model_card import Accuracy, Facts
from metaformer.models.record import Record, read_record
from tests.models.export.test_programs import network as unnamed

IMAGES = Preprocessing(64, 0.8, ResizeFilter.bilinear, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
CLASSES = ("cat", "dog", "ü")
FACTS = Facts(Accuracy(71.234, 90.5, 1234, 30, averaged=True), "flowers", {"epochs": 30}, "torch 9", "abc123", "mit")


def network(name: str, library: Library = Library.metaformer) -> Exportable:
    torch.manual_seed(0)
    make = create_model if library is Library.metaformer else timm.create_model
    model = make(name, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.1)
    record = Record(name, library, None, 3, CLASSES, IMAGES)
    return Exportable(model.eval(), record, 80, torch.randn(3, 3, 64, 64), "of a test", "run/model.safetensors")


def test_timm_loads_a_network_of_timm(tmp_path: Path) -> None:
    """Timm makes the same logits from the folder, and takes preprocessing and classes from it."""
    given, folder = network("test_resnet", Library.timm), tmp_path / "Hub folder"
    found = write_hub_folder(given, FACTS, folder, "flowers")
    assert found is not None
    assert found.agreement.difference == 0
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(loaded(given.images), given.logits(given.images))
    data = timm.data.resolve_model_data_config(loaded)
    assert (tuple(data["input_size"]), data["crop_pct"], data["interpolation"]) == ((3, 64, 64), 0.8, "bilinear")
    assert (tuple(data["mean"]), tuple(data["std"])) == (IMAGES.mean, IMAGES.std)
    assert tuple(loaded.pretrained_cfg["label_names"]) == CLASSES
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == [folder.name]


def test_timm_makes_the_network_for_the_size(tmp_path: Path) -> None:
    """A transformer of another image size than timm's has the same logits in timm."""
    model = create_timm_model("test_vit", 3, image_size=64)
    record = Record("test_vit", Library.timm, None, 3, CLASSES, IMAGES)
    given = Exportable(model.eval(), record, 80, torch.randn(3, 3, 64, 64), "of a test", "run/model.safetensors")
    found = write_hub_folder(given, FACTS, tmp_path / "hub", "flowers")
    assert found is not None
    assert found.agreement.holds


def test_the_card_says_that_timms_poolformer_has_another_head(tmp_path: Path) -> None:
    """The difference of the logits is measured; this project's own loading gives the same logits."""
    given, folder = network("poolformer_s12"), tmp_path / "hub"
    found = write_hub_folder(given, FACTS, folder, "flowers")
    assert found is not None
    assert not found.agreement.holds
    card = (folder / "README.md").read_text()
    assert "**timm computes other logits and has another accuracy.**" in card
    assert f"differ by at most {found.agreement.difference:.2g}" in card
    assert read_record(folder / "model.safetensors") == given.record
    own = create_model(str(folder / "model.safetensors"), num_classes=3).eval()
    load_weights(own, folder / "model.safetensors")
    assert torch.equal(own(given.images), given.logits(given.images))


def test_networks_that_timm_computes_otherwise(tmp_path: Path) -> None:
    """Other features than timm's, and weights that timm cannot load, are refused; nothing is written."""
    given = network("poolformer_s12")
    given.model.get_submodule("stages.0").register_forward_hook(lambda stage, inputs, out: 1.01 * out)
    with pytest.raises(
        UserError, match=r"^model=poolformer_s12: timm's network computes other features; nothing is wri"
    ):
        write_hub_folder(given, FACTS, tmp_path / "hub", "flowers")
    misnamed = replace(given, record=replace(given.record, name="poolformer_s24"))
    with pytest.raises(UserError, match=r"^model=poolformer_s24: timm cannot load the weights \("):
        write_hub_folder(misnamed, FACTS, tmp_path / "hub", "flowers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["convformer_s18", "poolformerv2_s12"])
def test_heads_that_are_timms(tmp_path: Path, name: str) -> None:
    """Timm makes the same logits of the second paper's networks, and the card does not say otherwise."""
    found = write_hub_folder(network(name), FACTS, tmp_path / "hub", "flowers")
    assert found is not None
    assert found.agreement.holds
    assert "other logits" not in (tmp_path / "hub" / "README.md").read_text()


def test_networks_that_timm_does_not_have(tmp_path: Path) -> None:
    """The card says so."""
    assert write_hub_folder(unnamed("own"), FACTS, tmp_path / "hub", "flowers") is None
    assert "timm has no such network: only metaformer loads" in (tmp_path / "hub" / "README.md").read_text()
    assert "timm" not in huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md").data.tags


def test_the_card_has_what_is_known_and_says_what_is_not(tmp_path: Path) -> None:
    """Accuracy, data, commit, recipe and licence are there, or unknown; nothing else has a number."""
    given = network("test_resnet", Library.timm)
    write_hub_folder(given, FACTS, tmp_path / "known", "flowers")
    card = huggingface_hub.ModelCard.load(tmp_path / "known" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert [(found.metric_name, found.metric_value) for found in card.data.eval_results] == [
        ("top-1", 71.234), ("top-5", 90.5)
    ]  # fmt: skip
    for text in (
        "71.23 % of 1,234 validation images, after epoch 30, averaged weights", "| data | flowers |", "commit abc123",
        "| `epochs` | 30 |", "| classes | cat, dog, ü |", "| licence of the weights | mit |",
    ):  # fmt: skip
        assert text in card.text, text
    write_hub_folder(given, Facts(), tmp_path / "unknown", "flowers")
    card = huggingface_hub.ModelCard.load(tmp_path / "unknown" / "README.md")
    assert (card.data.license, card.data.eval_results) == ("unknown", None)
    for text in (
        "| accuracy | unknown: these", "| data | unknown |", "| code | commit unknown |", "The recipe is unknown.",
        "| licence of the weights | unknown |",
    ):  # fmt: skip
        assert text in card.text, text
    assert "%" not in card.text


class Hub(ThreadingHTTPServer):
    """A server with the hub's addresses for a commit; it keeps the files that are uploaded."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.created, self.files = status, dict[str, Any](), dict[str, bytes]()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers in the hub's format."""

    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address, answer = f"http://{self.headers['Host']}/user/flowers", dict[str, Any]()
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": address, "name": "user/flowers"}
        elif self.path == "/api/models/user/flowers/preupload/main":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif self.path == "/api/models/user/flowers/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files = {entry["path"]: base64.b64decode(entry["content"]) for entry in files}
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"}
        text = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_push(tmp_path: Path, hub: Hub) -> None:
    """The three files arrive as they are, in a repository that is created private."""
    given, folder = network("test_resnet", Library.timm), tmp_path / "hub"
    write_hub_folder(given, FACTS, folder, "flowers")
    assert push(folder, "user/flowers") == f"{huggingface_hub.constants.ENDPOINT}/user/flowers"
    assert (hub.created["name"], hub.created["organization"]) == ("flowers", "user")
    assert "private" in (hub.created.get("visibility"), "private" if hub.created.get("private") else None)
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "model.safetensors").write_bytes(hub.files["model.safetensors"])
    assert load_file(tmp_path / "model.safetensors").keys() == given.model.state_dict().keys()


def test_push_that_fails(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal and a hub that cannot be reached end in one line that says how to go on; bad names are refused."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.status = 403
    with pytest.raises(UserError, match=rf"^--push=user/flowers: failed \(.*403.*\); {tmp_path} is complete: log in"):
        push(tmp_path, "user/flowers")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^--push=user/flowers: failed \(.*"):
        push(tmp_path, "user/flowers")
    for name in ("flowers", "a/b/c", "user/..", "user/flo wers"):
        with pytest.raises(UserError, match=rf"^--push={name}: not a repository"):
            check_repository(name)
