"""Networks exported to ONNX and torch.export: the same logits, any number of images, and a description."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models import create_model
from metaformer.models.composition import Composition
from metaformer.models.config import Library
from metaformer.models.export.exportable import Agreement, Exportable
from metaformer.models.export.programs import export_onnx, export_program
from metaformer.models.preprocessing import paper_preprocessing
from metaformer.models.record import Record

Export = Callable[[Exportable, Path], Agreement]
ATTENTION = Composition(
    depths=(1, 1), dims=(8, 32), token_mixers=("pooling", "attention"), layer_scale=0.5, head="mlp"
)  # fmt: skip


def exportable(model: nn.Module, record: Record) -> Exportable:
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that every one affects the logits
        nn.init.normal_(parameter, 0.1, 0.3)
    return Exportable(model.eval(), record, 35, torch.randn(4, 3, 32, 32), "of a test", "run/model.safetensors")


def network(kind: str) -> Exportable:
    if kind == "timm":
        record = Record("test_resnet", Library.timm, None, 3, ("a", "b", "c"))
        return exportable(timm.create_model("test_resnet", num_classes=3), record)
    images = paper_preprocessing("metaformer")
    record = Record("metaformer", composition=ATTENTION, num_classes=3, classes=("a", "b", "ü"), images=images)
    return exportable(create_model(ATTENTION, 3, image_size=32), record)


def run_file(file: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return the function of an exported file, and the description in it."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file)
        found = session.get_modelmeta().custom_metadata_map["network"]
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), found
    extra = {"network": ""}
    program = torch.export.load(file, extra_files=extra).module()
    return torch.no_grad()(program), extra["network"]


@pytest.mark.parametrize(("export", "suffix"), [(export_onnx, "onnx"), (export_program, "pt2")])
@pytest.mark.parametrize("kind", ["own", "timm"])
def test_same_logits_for_any_number_of_images(tmp_path: Path, export: Export, suffix: str, kind: str) -> None:
    """A file computes the network's logits for 1 and 7 images, and has its description, as the file beside it does."""
    given, file = network(kind), tmp_path / f"m.{suffix}"
    agreement = export(given, file)
    assert agreement.difference <= 1e-5 * agreement.largest
    compute, inside = run_file(file)
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(compute(images), given.logits(images), rtol=1e-4, atol=1e-4 * agreement.largest)
    beside = json.loads((tmp_path / "m.json").read_text())
    assert beside.pop("checked") == {**agreement._asdict(), "torch": torch.__version__}
    assert beside == json.loads(inside) == json.loads(json.dumps(given.describe()))
    assert beside["classes"] == list(given.record.classes or ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", file.name]


class Unfaithful(nn.Module):
    """A network that computes something else while it is exported."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.fc, self.factor = nn.Linear(3, 5), factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out * self.factor if torch.compiler.is_exporting() else out


@pytest.mark.parametrize(("export", "program"), [(export_onnx, "ONNX Runtime"), (export_program, "exported program")])
def test_other_logits_are_refused(tmp_path: Path, export: Export, program: str) -> None:
    """If the written file computes other logits, or ones that are not finite, nothing is written."""
    for factor in (1 + 5e-4, np.nan):
        with pytest.raises(UserError, match=rf"{program} computes other logits than torch \(largest difference"):
            export(exportable(Unfaithful(factor), Record("metaformer", composition=ATTENTION)), tmp_path / "m.x")
    assert not list(tmp_path.iterdir())
    export(exportable(Unfaithful(1 + 1e-6), Record("metaformer", composition=ATTENTION)), tmp_path / "m.x")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """The error names the weights as the cause."""
    broken = network("own")
    nn.init.constant_(next(broken.model.parameters()), np.inf)
    with pytest.raises(UserError, match=r"^checkpoint=run/model.safetensors: the outputs are not finite; use weights"):
        export_program(broken, tmp_path / "m.pt2")


class Branching(nn.Module):
    """A network whose computation depends on the values of the images, which cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.mean() > 0 else x.amax((2, 3))


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_networks_that_cannot_be_exported(tmp_path: Path, export: Export) -> None:
    """The error is one line with the network's name."""
    with pytest.raises(UserError, match=r"^model=test_resnet: torch cannot export it \(.+\)$"):
        export(exportable(Branching(), Record("test_resnet", Library.timm)), tmp_path / "m.x")
    assert not list(tmp_path.iterdir())


def test_too_large_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more bytes than a file of ONNX can have are refused before anything is exported."""
    monkeypatch.setattr("metaformer.models.export.programs.MAX_ONNX_BYTES", 1000)
    with pytest.raises(
        UserError, match=r"^onnx: the weights have [\d,]+ bytes, and an ONNX file fewer than 1,000; exp"
    ):
        export_onnx(network("timm"), tmp_path / "m.onnx")


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages for ONNX, the error says how to install them; torch.export needs none."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"the package onnxruntime is not installed; run `uv pip install onnx onnxsc"):
        export_onnx(network("timm"), tmp_path / "m.onnx")
    export_program(network("timm"), tmp_path / "m.pt2")
