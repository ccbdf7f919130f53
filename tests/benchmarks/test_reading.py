"""The benchmark of a worker's stages from the command line."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import reading
from metaformer.errors import UserError
from tests.data.conftest import decode, pack


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["reading.py", *map(str, arguments)])
    reading.main()


def test_stages_add_up_in_each_format(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stages of each folder add up to what its speed says; the table shows JSON's figures."""
    roots = (images, pack(images, tmp_path / "shards"), decode(images, tmp_path / "pixels"))
    folders = [root / "train" for root in roots]
    file = tmp_path / "found.json"
    run(monkeypatch, *folders, "--images=26", "--repeats=2", f"--json={file}")
    found = json.loads(file.read_text())
    assert list(found["cases"]) == list(map(str, folders))
    table = capsys.readouterr().out
    for row in found["cases"].values():
        plain, augmented = (1000 / row[job] for job in reading.JOBS)
        stages = [row[stage] for stage in reading.STAGES]
        assert sum(stages) == pytest.approx(augmented)
        assert sum(stages) - row["RandAugment"] == pytest.approx(plain)
        assert row["read"] > 0
        assert f"{row['read']:.3f}" in table


def test_decoders_are_compared(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decoder that is named gets a row for each folder."""
    file, folder = tmp_path / "found.json", images / "train"
    run(monkeypatch, folder, "--images=13", "--repeats=1", "--decoders", "torchcodec", "nvImageCodec", f"--json={file}")
    assert list(json.loads(file.read_text())["cases"]) == [f"{folder} torchcodec", f"{folder} nvImageCodec"]


def test_wrong_options_are_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder, no images and an output that cannot be written: one line, before anything is measured."""
    for arguments, message in (
        ((tmp_path / "none",), "no such folder"),
        ((images / "train", "--images=0"), "--images=0: must be at least 1"),
        ((images / "train", f"--json={tmp_path}"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *arguments)
