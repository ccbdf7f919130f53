"""predict: the same outputs as validate.py, all its files, and its errors."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from metaformer import runtime
from metaformer.assembly import build_predictor
from metaformer.commands import predict
from metaformer.composing import compose_validation
from metaformer.data.index.image_index import load_index
from metaformer.data.load.listed_images import list_images
from metaformer.errors import Diverged, UserError
from metaformer.models import create_model, save_weights
from metaformer.models.composition import Composition
from metaformer.models.record import Record
from tests.conftest import QUICK, REPOSITORY, launch
from tests.warm import python

Run = Callable[..., dict[str, Any]]
Predict = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network of one's own parts with an EMA and preprocessing of its own."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    network = ("model=metaformer", "model.depths=[1,1,1,1]", "model.dims=[8,8,16,16]", "model.drop_path_rate=0")
    own = ("model.crop_pct=0.8", "model.interpolation=bilinear", "model.mean=[0.4,0.5,0.6]", "ema=enabled")
    done = launch("train", *QUICK, *network, *own, f"data.root={images}", f"run_dir={run_dir}", "max_steps=6",
                  "ema.decay=0.5", "workers=0")  # fmt: skip
    assert done.code == 0, done.stderr
    return run_dir


@pytest.fixture
def predict_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Predict:
    """Return a function that runs predict with --json in this process and returns the printed objects."""

    def run(*arguments: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["predict.py", "--json", *map(str, arguments)])
        predict.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("options", [(), ("loader=pil",), ("use_ema=true",), ("image_size=64", "model.crop_pct=1.0")])
def test_same_logits_as_validation(images: Path, trained: Path, run_program: Run, options: tuple[str, ...]) -> None:
    """The logits give validate.py's loss and top-1 on the same images, with the network that the run records."""
    common = (f"checkpoint={trained}", "eval_batch_size=50", *options)
    expected = run_program("validate", f"data.root={images}", "workers=0", *common)
    listed, _ = list_images([str(images / "val")])
    with runtime.start() as ranks:
        predictor = build_predictor(compose_validation(common), ranks, heat_maps=False, layer=None)
        outputs = list(predictor(listed))
        logits = torch.cat([output.logits for output in outputs])
        mapped = build_predictor(compose_validation(common), ranks, heat_maps=True, layer="stages.2")
        again = list(mapped(listed[:3]))
    labels = torch.tensor(load_index(images, "val").labels)
    assert cross_entropy(logits, labels).item() == pytest.approx(expected["loss"], rel=1e-5)
    assert 100 * (logits.argmax(1) == labels).double().mean().item() == pytest.approx(expected["top1"])
    assert torch.allclose(again[0].logits, logits[:3], atol=1e-5)
    assert again[0].maps is not None
    assert again[0].maps.shape[0] == 3


def test_everything_at_once(images: Path, trained: Path, tmp_path: Path) -> None:
    """scripts/predict.py names bad files, predicts the others, writes all files, and its exit code says so."""
    names = [str(images / "val" / f"class_{label}" / f"00{label}.JPEG") for label in range(4)]
    (tmp_path / "bad.jpg").write_text("no image")
    given = "\n".join([names[0], "", str(tmp_path / "bad.jpg"), *names[1:]])
    files = ("--csv", "p.csv", "--grid", "g.png", "--cam", "maps/here", "--cam-layer", "stages.2")
    options = (f"checkpoint={trained}", *files, "--top-k", "2")
    done = subprocess.run(
        [python(), str(REPOSITORY / "scripts" / "predict.py"), "-", *options, "eval_batch_size=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path, input=given,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    errors = done.stderr.splitlines()
    assert f"warning: {tmp_path / 'bad.jpg'}: not in a supported image format" in done.stderr
    assert errors[-1] == "error: 1 of 5 could not be read; they are named above"
    assert "classes      4 names from the weights" in errors
    assert "Traceback" not in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("/")] == names
    assert done.stdout.count(" %  class_") == 8
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[::2]] == names
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    assert sorted(file.name for file in (tmp_path / "maps" / "here").iterdir()) == [f"00{n}.png" for n in range(4)]
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.width > grid.height > 300


def test_unnamed_classes(images: Path, tmp_path: Path, predict_json: Predict) -> None:
    """1000 classes without names are ImageNet's; another number is given and gets numbers."""
    image = next((images / "val" / "class_0").iterdir())
    for count, name in ((1000, "n"), (7, "")):
        model = create_model("poolformer_s12", count)
        save_weights(model, tmp_path / "w", "poolformer_s12")
        options = () if count == 1000 else ("num_classes=7",)
        (found,) = predict_json(image, f"checkpoint={tmp_path / 'w'}", "image_size=32", "--top-k", 1, *options)
        (guess,) = found["predictions"]
        assert guess["name"] == (guess["name"] if count == 1000 else str(guess["class"]))
        assert guess["name"].startswith(name)
        assert ("description" in guess) == (count == 1000)
    with pytest.raises(UserError, match=r"has 7 classes .* set num_classes=7"):
        predict_json(image, f"checkpoint={tmp_path / 'w'}", "image_size=32")


def test_outputs_that_are_not_finite(images: Path, trained: Path, tmp_path: Path, predict_json: Predict) -> None:
    """Weights with NaN are an error with their name, not a prediction."""
    composition = Composition(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    model = create_model(composition, 3)
    torch.nn.init.constant_(model.stem.conv.weight, torch.nan)
    save_weights(model, tmp_path / "w", Record("metaformer", composition=composition, num_classes=3))
    with pytest.raises(Diverged, match=r"000\.JPEG: the network's outputs are not finite: stem\.conv\.weight has"):
        predict_json(images / "val" / "class_0" / "000.JPEG", f"checkpoint={tmp_path / 'w'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("EMPTY", "RUN"), r"empty: no images to predict$"),
        (("-", "RUN"), r"^-: no images to predict$"),
        (("RUN",), r"^no image given; give image files, folders, or -"),
        (("IMAGE",), r"^checkpoint: missing; give checkpoint=FILE"),
        (("IMAGE", "checkpoint=nothere"), r"nothere"),
        (("IMAGE", "RUN", "--top-k", "0"), r"^--top-k 0: must be at least 1$"),
        (("IMAGE", "RUN", "data.root=x"), r"^data\.root=x: validate\.py only; predict takes images by name"),
        (("IMAGE", "RUN", "results_csv=x"), r"^results_csv=x: validate\.py only"),
        (("IMAGE", "RUN", "lr=1"), r"^lr"),
        (("IMAGE", "RUN", "loader=dali"), r"^loader=dali: stops at the first bad file"),
        (("IMAGE", "RUN", "--cam-layer", "x"), r"^--cam-layer x: requires --cam FOLDER"),
        (("IMAGE", "RUN", "--cam", "maps", "--cam-layer", "x"), r"^--cam-layer=x: no such part of the network"),
        (("IMAGE", "RUN", "--cam", "maps", "--cam-layer", "head.fc"), r"^--cam-layer=head\.fc: its output is not"),
        (
            ("IMAGE", "RUN", "--cam", "maps"),
            r"^--cam: the last stage: its output has a single position, of which a map shows nothing; name another "
            r"part of the network with --cam-layer, such as stages\.2$",
        ),
        (("IMAGE", "RUN", "--cam", "maps", "compile=true"), r"^compile=true: not possible with --cam"),
        (
            ("IMAGE", "RUN", "--csv", "no/p.csv"),
            r"^--csv=no/p\.csv: cannot be written \(No such .*\); give another place$",
        ),
        (("IMAGE", "RUN", "--grid", "."), r"^--grid=\.: cannot be written"),
        (("IMAGE", "RUN", "--cam", "file/maps"), r"^--cam=file/maps: cannot be made"),
        (("IMAGE", "checkpoint=file"), r"file: "),
    ],
)
def test_errors(
    images: Path, trained: Path, tmp_path: Path, predict_json: Predict, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    """Wrong input is one line that names the option."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\r\n")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    names = {"EMPTY": "empty", "IMAGE": str(images / "val" / "class_0" / "000.JPEG"), "RUN": f"checkpoint={trained}"}
    with pytest.raises(UserError, match=message) as caught:
        predict_json(*(names.get(argument, argument) for argument in arguments))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_file_named_like_an_option(
    images: Path, trained: Path, tmp_path: Path, predict_json: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An existing file is an image, even if its name looks like an option."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=1").write_bytes((images / "val" / "class_0" / "000.JPEG").read_bytes())
    (found,) = predict_json("seed=1", f"checkpoint={trained}")
    assert found["image"] == "seed=1"
