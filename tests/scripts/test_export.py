"""scripts/export.py, from a run to files for other programs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
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


def test_a_run_is_exported(images: Path, tmp_path: Path, run_program: Run, run_export: Callable[..., str]) -> None:
    """An ONNX file and a program have the run's classes and preprocessing, and say what they were checked with."""
    run = tmp_path / "flowers"
    settings = ("model=timm", "model.name=test_resnet", "workers=0", "max_steps=1", "ema=enabled")
    run_program("train", f"data.root={images}", *QUICK, *settings, f"run_dir={run}")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "checkpoint=x", "epochs=3", "--out", "m"), "epochs=3: export has no such option; its options are ch"),
        (("torch", "checkpoint=x", "--out", "m.json"), "--out=m.json: is the name of the description; use one that "),
        (("torch", "--out", "m.pt2"), "checkpoint: missing; give checkpoint=FILE, a checkpoint folder or a run folder"),
        (("torch", "checkpoint=nothing", "--out", "m.pt2"), "checkpoint=nothing: no file, and no checkpoint or run "),
        (("torch", "checkpoint=x", "--out", "no/m"), "--out=no/m: cannot be written (No such file or directory)"),
        (("torch", "checkpoint=x", "--out", "there"), "--out=there: there already exists; give another name"),
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
