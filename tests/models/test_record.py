"""Tests of the record of a network in its weights file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from metaformer.errors import UserError
from metaformer.models import create_model, load_weights, save_weights
from metaformer.models.composition import Composition
from metaformer.models.config import Library, Preprocessing, ResizeFilter
from metaformer.models.record import ENTRY, MAX_LENGTH, Record, read_record

TINY = Composition(depths=(1, 1), dims=(4, 8))
IMAGES = Preprocessing(96, 0.8, ResizeFilter.bilinear, (0.4, 0.5, 0.6), (0.1, 0.2, 1))
OWN = Record("metaformer", Library.metaformer, TINY, 3, ("a cat", "dög \udcff", '"\\'), IMAGES)


def record_of(folder: Path, **metadata: str) -> Record | None:
    """Return the record of a file with this metadata."""
    save_file({"a": torch.zeros(1)}, folder / "w", metadata=metadata)
    return read_record(folder / "w")


@pytest.mark.parametrize(
    "record",
    [
        OWN,
        Record("poolformer_s12"),
        Record("resnet18.a1_in1k", Library.timm, num_classes=21_841, classes=tuple(f"n{i:08}" for i in range(21_841))),
        replace(OWN, num_classes=1000),
    ],
    ids=lambda record: record.name,
)
def test_what_is_written_is_read(tmp_path: Path, record: Record) -> None:
    """All fields are kept, with any names of classes, and those of ImageNet-21K; other programs read the name."""
    save_weights(create_model(TINY, num_classes=3), tmp_path / "w", record)
    found = read_record(tmp_path / "w")
    assert found is not None
    assert found == replace(record, composition=record.composition and record.composition.canonical())
    with safe_open(tmp_path / "w", "pt") as file:
        assert file.metadata()["model"] == record.name


def test_files_of_earlier_versions_and_of_others(tmp_path: Path) -> None:
    """Earlier versions wrote the name, and the parts of a network of one's own; other files have no record."""
    assert record_of(tmp_path, model="poolformer_s24") == Record("poolformer_s24")
    own = record_of(tmp_path, model="metaformer", composition=TINY.to_json())
    assert own == Record("metaformer", composition=TINY.canonical())
    for metadata in ({"format": "pt"}, {"model": "resnet18"}, {}):
        assert record_of(tmp_path, **metadata) is None
    (tmp_path / "w").write_bytes(b"no safetensors")
    assert read_record(tmp_path / "w") is None
    assert read_record(tmp_path / "missing") is None


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    """A record with more fields is read without them."""
    assert record_of(tmp_path, network=json.dumps(json.loads(OWN.to_json()) | {"licence": "?"})) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3}, {"name": None}, {"name": "poolformer"}, {"name": "w"}, {"library": "torchvision"}, {"library": []},
        {"composition": []}, {"composition": {"norm": 3}}, {"num_classes": 0}, {"num_classes": 2},
        {"num_classes": True}, {"num_classes": 3.0}, {"classes": "abc"}, {"classes": [1, 2]}, {"classes": ["a", "a"]},
        {"images": 3}, {"images": {}}, *({"images": json.loads(OWN.to_json())["images"] | change} for change in (
            {"image_size": 0}, {"image_size": 10**9}, {"image_size": "96"}, {"crop_pct": 0}, {"crop_pct": float("nan")},
            {"crop_pct": "1"}, {"interpolation": "lanczos"}, {"mean": [0.1]}, {"mean": [0, 0, 10**400]}, {"mean": 0.5},
            {"std": [0, 0.1, 0.1]}, {"std": [True, 0.1, 0.1]},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """One line that names the file."""
    values = json.loads(OWN.to_json()) | {"composition": None, "name": "poolformer_s12"} | change
    with pytest.raises(UserError, match=r"w: cannot read which network it is of \(.+\)$"):
        record_of(tmp_path, network=json.dumps(values))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "\n", "[" * 100_000, "9" * 100_000, " " * (MAX_LENGTH + 1)],
    ids=lambda text: f"{text[:5]!r} {len(text)}",
)  # fmt: skip
def test_other_text_is_refused(tmp_path: Path, text: str) -> None:
    """Text that is no record, nested or long beyond reason, gives one line."""
    with pytest.raises(UserError, match=r"w: cannot read which network it is of \(.+\)$") as caught:
        record_of(tmp_path, **{ENTRY: text})
    assert len(str(caught.value)) < 500


def test_metadata_beyond_the_format(tmp_path: Path) -> None:
    """A header of more than 100 MB, which safetensors refuses to read, is no record; loading the file reports it."""
    header = json.dumps({"__metadata__": {ENTRY: "x" * 100_000_001}}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_record(tmp_path / "w") is None
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_weights(create_model(TINY, num_classes=3), tmp_path / "w")


def test_networks_are_made_again(tmp_path: Path) -> None:
    """create_model takes a file with a record; one of timm's networks is refused, and so is a file without."""
    for record in (OWN, Record("poolformer_s12")):
        save_weights(create_model(TINY, num_classes=3), tmp_path / "w", record)
        expected = create_model(record.composition or record.name, num_classes=3).state_dict()
        made = create_model(str(tmp_path / "w"), num_classes=3).state_dict()
        assert {key: tensor.shape for key, tensor in made.items()} == {k: t.shape for k, t in expected.items()}
    save_weights(create_model(TINY, num_classes=3), tmp_path / "w", Record("resnet18", Library.timm))
    with pytest.raises(UserError, match=r"w: is of timm's resnet18; use create_timm_model"):
        create_model(str(tmp_path / "w"))
