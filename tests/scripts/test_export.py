"""scripts/export.py, from a run to files for other programs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer import runtime
from metaformer.assembly.exporting import build_exportable
from metaformer.composing import compose_validation
from metaformer.errors import UserError
from metaformer.models import create_timm_model, save_weights
from scripts import export
from tests.conftest import QUICK

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the script and returns its stdout."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        export.main()
        return capsys.readouterr().out

    return run


def test_a_run_is_exported(
    images: Path, tmp_path: Path, run_program: Run, run_export: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX, torch.export and the hub's folder have the run's classes, preprocessing, images, accuracy and recipe."""
    run = tmp_path / "flowers"
    settings = ("model=timm", "model.name=test_resnet", "workers=0", "epochs=1", "ema=enabled", "ema.decay=0.5")
    result = run_program("train", f"data.root={images}", *QUICK, *settings, f"run_dir={run}")
    printed = run_export("onnx", f"checkpoint={run}", "use_ema=true", "--out", tmp_path / "m.onnx")
    assert printed.startswith(f"{tmp_path / 'm.onnx'}: largest difference ")
    described = json.loads((tmp_path / "m.json").read_text())
    assert described["checked"]["images"] == f"8 images of {images.name}/val"
    assert described["weights"].startswith("flowers/checkpoints/")
    assert described["weights"].endswith("/ema.safetensors")
    assert described["classes"] == [f"class_{number}" for number in range(4)]
    assert (described["images"]["image_size"], described["input"]["shape"]) == (32, ["batch", 3, 32, 32])
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((run / "checkpoints" / "last" / "model.safetensors").read_bytes())
    printed = run_export("torch", f"checkpoint={copy}", "--out", tmp_path / "p.pt2")
    assert printed.endswith("on 8 images of the built-in sample's digits\n")
    run_export("hub", f"checkpoint={run / 'checkpoints' / 'last'}", "--out", tmp_path / "hub", "--license", "mit")
    card = (tmp_path / "hub" / "README.md").read_text()
    figures = f"{result['top1']:.2f} % of {result['images']} validation images, after epoch 1 |"
    for text in (figures, f"| data | {images.name} |", "| `epochs` | 1 |", "| `ema.decay` | 0.5 |", "license: mit"):
        assert text in card, text
    assert str(tmp_path) not in card
    assert str(images) not in card


@pytest.mark.parametrize(("outputs", "names"), [(1000, ("n01440764", "n15075141")), (7, None)])
def test_weights_without_a_record(images: Path, tmp_path: Path, outputs: int, names: tuple[str, str] | None) -> None:
    """1000 outputs without names get ImageNet's, any other number none, and a line says so."""
    save_weights(create_timm_model("test_resnet", outputs), tmp_path / "w", "test_resnet")
    network = ("model=timm", "model.name=test_resnet", "image_size=32", f"num_classes={outputs}")
    config = compose_validation([f"checkpoint={tmp_path / 'w'}", f"data.root={images}", *network])
    with runtime.start() as ranks:
        built = build_exportable(config, ranks, data_given=True)
    found = built.network.record.classes
    assert (found and (found[0], found[-1], len(found))) == (names and (*names, outputs))
    said = "the weights record no names; taken for timm's 1,000 of imagenet" if names else "7 numbers: the weights reco"
    assert any(note.startswith(f"classes      {said}") for note in built.notes), built.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "checkpoint=x", "epochs=3", "--out", "m"), "epochs=3: export has no such option; its options are ch"),
        (("onnx", "checkpoint=x", "--out", "m", "--push", "a/b"), "--push a/b: requires the format hub; use that, or"),
        (("torch", "checkpoint=x", "--out", "m.json"), "--out=m.json: is the name of the description; use one that "),
        (("torch", "--out", "m.pt2"), "checkpoint: missing; give checkpoint=FILE, a checkpoint folder or a run folder"),
        (("torch", "checkpoint=nothing", "--out", "m.pt2"), "checkpoint=nothing: no file, and no checkpoint or run "),
        (("hub", "checkpoint=x", "--out", "m", "--push", "me"), "--push=me: not a repository (without a user or organ"),
        (("hub", "checkpoint=x", "--out", "no/m"), "--out=no/m: cannot be written (No such file or directory)"),
        (("hub", "checkpoint=x", "--out", "there"), "--out=there: there already exists; give another name"),
    ],
)  # fmt: skip
def test_wrong_options(
    tmp_path: Path, run_export: Callable[..., str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    """Each ends in one line that names the option; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    with pytest.raises(UserError) as caught:
        run_export(*arguments)
    assert str(caught.value).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
