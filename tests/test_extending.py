"""Runs the examples of docs/extending.md, as they stand there."""

import csv
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from tests.conftest import QUICK, REPOSITORY, rows

PAGE = REPOSITORY / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(command) for kind, text in BLOCKS if kind == "sh" for command in text.replace("\\\n", " ").splitlines()
]
RUNS = {command[2]: command for command in COMMANDS if command[1] == "train.py"}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the page's files and the images."""
    for kind, text in BLOCKS:
        if kind != "sh":
            file = tmp_path / text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    (tmp_path / "images").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def train(run_program: Run, command: list[str]) -> Path:
    """Run a command of the page for an epoch of small steps; return its run folder."""
    mixing = () if "augmentation=strong" in command else ("augmentation=light",)
    lr = ("optimizer.lr=null", "schedule.warmup_epochs=0") if "optimizer=lion" in command else ()
    return Path(run_program("train", *QUICK, "workers=0", "epochs=1", *mixing, *command[2:], *lr)["run_dir"])


def test_the_page_has_an_example_of_each_part() -> None:
    """There is one command that trains for each of the five parts, and one that validates."""
    assert len(RUNS) + sum("--config-dir" in command for command in COMMANDS) - 1 == 5
    assert [command[1] for command in COMMANDS].count("validate.py") == 1


def test_a_network(folder: Path, run_program: Run) -> None:
    """The network trains, and is validated by the page's command."""
    first, second = COMMANDS[0], COMMANDS[1]
    run_dir = train(run_program, first)
    assert run_dir == Path("runs/SmallNet-default")
    assert "target       my_networks:SmallNet, width=48" in (run_dir / "log.txt").read_text()
    result = run_program("validate", "precision=fp32", "workers=0", *second[2:])
    assert result["top1"] == rows(run_dir, "validation")[-1]["top1"]


def test_a_token_mixer(folder: Path, run_program: Run) -> None:
    """The network with the page's token mixer trains."""
    run_dir = train(run_program, COMMANDS[2])
    assert "my_mixers:Shift" in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize(
    ("number", "text"), [(3, "augmentation strong"), (4, "optimizer    lion, lr 7.81e-07, weight decay 0.5")]
)
def test_groups_of_ones_own(folder: Path, run_program: Run, number: int, text: str) -> None:
    """The page's augmentation and optimizer are found in --config-dir, and used."""
    small = ("model=metaformer", "model.depths=[1]", "model.dims=[32]")
    assert text in (train(run_program, [*COMMANDS[number], *small]) / "log.txt").read_text()


def test_a_tracker(folder: Path, run_program: Run) -> None:
    """The page's tracker receives the validation, in its own process; one that cannot be imported is an error."""
    small = ("model=metaformer", "model.depths=[1]", "model.dims=[32]")
    run_dir = train(run_program, [*COMMANDS[5], *small])
    with (run_dir / "top1.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["top1"]) for row in read] == [row["top1"] for row in rows(run_dir, "validation")]
    with pytest.raises(UserError, match=r"tracking.target=my_trackers:Csv: cannot be imported"):
        train(run_program, [*COMMANDS[5], *small, "tracking.target=my_trackers:Csv", "run_dir=other"])
