"""The benchmark of scaling: a real measurement of two ranks."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import loader, scaling, train
from metaformer.errors import UserError
from tests.warm import python


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options])
    monkeypatch.setattr(sys, "executable", python())
    scaling.main()


def test_two_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All ways of exchanging gradients are measured, and are in the table and in the file."""
    options = ("--ranks", "2", "--batch=2", "--image-size=32", "--steps=1", "--rounds=1")
    run(monkeypatch, *options, f"--json={tmp_path / 'found.json'}")
    printed = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "found.json").read_text())["found"]
    assert found["ranks"] == 2
    assert found["parameters"] == 11_915_176
    assert len(found["seconds"]) == 8
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert all(name in printed for name in found["seconds"])


def test_a_measurement_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed measurement ends in one line, which contains the program's own error."""
    with pytest.raises(UserError, match=r"^1 ranks: .*unknown") as caught:
        run(monkeypatch, "--ranks", "1", "--model=poolformer_s13")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (scaling, ["--ranks=1", "--json"]),
        (train, ["--json"]),
        (train, ["--plot"]),
        (loader, [".", "--json"]),
    ],
)
def test_outputs_are_checked_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: ModuleType, options: list[str]
) -> None:
    """A file that could not be written in the end is refused before anything is measured."""
    monkeypatch.setattr(script, "_measure", lambda *arguments: pytest.fail("it has been measured"))
    monkeypatch.setattr(sys, "argv", ["", *options, str(tmp_path)])
    with pytest.raises(UserError, match=rf"^{options[-1]}={tmp_path}: cannot be written \(not a file\)"):
        script.main()
