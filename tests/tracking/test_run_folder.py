"""Tests of the records in a run folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from metaformer.errors import UserError
from metaformer.tracking.lock import lock_run_folder
from metaformer.tracking.run_folder import check_empty, check_is_for_runs, open_run_folder
from tests.conftest import QUICK, REPOSITORY

Run = Callable[..., dict[str, Any]]


def test_files_of_a_run(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Configuration, overrides and environment are written; a change keeps the earlier files and is recorded."""
    run_dir = tmp_path / "run"
    small = ("model=timm", "model.name=test_resnet", "model.drop_path_rate=null", "workers=0")
    command = (f"data.root={images}", *QUICK, *small, "epochs=2", f"run_dir={run_dir}")
    run_program("train", *command, "max_steps=6")
    written = (run_dir / "config.yaml").read_text()
    assert "max_steps: 6\n" in written
    assert "weight_decay: 0.05\n" in written, "defaults are written too"
    assert '- "max_steps=6"\n' in (run_dir / "overrides.yaml").read_text()
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert environment["command"][1:] == [*command, "max_steps=6"]

    run_program("train", *command, "epochs=1", "log_every_steps=3")
    (earlier,) = run_dir.glob("config.until-*.yaml")
    assert earlier.read_text() == written
    lines = [line.split(" changed ")[1].strip() for line in (run_dir / "log.txt").read_text().splitlines()
             if " changed " in line]  # fmt: skip
    assert lines == ["epochs: 2 -> 1", "log_every_steps: 1 -> 3", "max_steps: 6 -> null"]
    (entry,) = map(json.loads, (run_dir / "changes.jsonl").read_text().splitlines())
    assert entry["step"] == 6
    assert entry["changes"] == {"epochs": [2, 1], "log_every_steps": [1, 3], "max_steps": [6, None]}

    with pytest.raises(UserError, match=r"run_dir=\S+: not empty, and resume=never"):
        run_program("train", *command, "resume=never")


def test_same_configuration_is_no_change(tmp_path: Path) -> None:
    """Opening the folder again with the same configuration reports and renames nothing."""
    (tmp_path / "run").mkdir()
    assert open_run_folder(tmp_path / "run", "a: 1\nb: 2\n", 0) == []
    assert open_run_folder(tmp_path / "run", "a: 1\nb: 2\n", 0) == []
    assert list((tmp_path / "run").glob("*until*")) == []


def test_changes_are_json(tmp_path: Path) -> None:
    """An infinity among the options is null in changes.jsonl; the earlier config.yaml keeps it."""
    (tmp_path / "run").mkdir()
    open_run_folder(tmp_path / "run", "clip: .inf\nlr: [.nan]\n", 0)
    open_run_folder(tmp_path / "run", "clip: 1.0\nlr: [.inf]\n", 2)
    assert '"changes": {"clip": [null, 1.0], "lr": [[null], [null]]}' in (tmp_path / "run/changes.jsonl").read_text()


def test_a_resume_on_other_ranks_is_a_change(tmp_path: Path) -> None:
    """Values derived from the number of ranks are compared too, except with older folders that lack them."""
    ranks = {"ranks": 1, "images that share one mixing": 8}
    assert open_run_folder(tmp_path, "a: 1\n", 0) == []
    assert open_run_folder(tmp_path, "a: 1\n", 0, ranks) == []
    assert open_run_folder(tmp_path, "a: 1\n", 0, ranks) == []
    now = {"ranks": 2, "images that share one mixing": 4}
    assert open_run_folder(tmp_path, "a: 2\n", 6, now) == [
        "a: 1 -> 2", "ranks: 1 -> 2", "images that share one mixing: 8 -> 4",
    ]  # fmt: skip
    (entry,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert entry["step"] == 6
    assert entry["changes"] == {"a": [1, 2], "ranks": [1, 2], "images that share one mixing": [8, 4]}


def test_every_earlier_configuration_is_kept(tmp_path: Path) -> None:
    """No earlier configuration is lost when several changes happen within a second."""
    (tmp_path / "run").mkdir()
    for value in range(4):
        changed = open_run_folder(tmp_path / "run", f"a: {value}\nb: 2\n", 0)
        assert changed == ([f"a: {value - 1} -> {value}"] if value else [])
    kept = {path.read_text() for path in (tmp_path / "run").glob("config.until-*.yaml")}
    assert kept == {f"a: {value}\nb: 2\n" for value in range(3)}


def test_a_change_to_a_value_that_occurs_elsewhere(tmp_path: Path) -> None:
    """A change is reported with the full field name, even if another field has the same name and value."""
    (tmp_path / "run").mkdir()
    open_run_folder(tmp_path / "run", "one:\n  name: a\ntwo:\n  name: b\n", 0)
    assert open_run_folder(tmp_path / "run", "one:\n  name: b\ntwo:\n  name: b\n", 0) == ["one.name: a -> b"]


def test_environment(tmp_path: Path) -> None:
    """environment.json has the versions of Python and packages, the devices and the git commit."""
    open_run_folder(tmp_path, "a: 1\n", 0)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["packages"]["torch"] == version("torch")
    assert environment["packages"]["timm"] == version("timm")
    assert environment["cuda"] == torch.version.cuda
    assert len(environment["devices"]) == max(1, torch.cuda.device_count())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert environment["git"]["commit"] == git.stdout.strip()


def test_only_an_empty_folder_is_new(tmp_path: Path) -> None:
    """resume=never accepts an empty folder with this run's lock, but not a folder with a file."""
    with lock_run_folder(tmp_path / "empty"):
        check_empty(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not empty, and resume=never"):
        check_empty(tmp_path)


@pytest.mark.parametrize("mark", ["lock", "config.yaml", "checkpoints"])
def test_folders_that_runs_may_use(tmp_path: Path, mark: str) -> None:
    """A folder with files only, and one with a run in any state, may be used, but not one with other folders only."""
    check_is_for_runs(tmp_path / "new")
    (tmp_path / "job.out").touch()
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".snapshot").mkdir()
    check_is_for_runs(tmp_path)
    for name in "cabd":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"^run_dir=\S+: holds other folders \(a, b, c, \.\.\.\) and no run; "):
        check_is_for_runs(tmp_path)
    (tmp_path / mark).mkdir()
    check_is_for_runs(tmp_path)


def test_unwritable_folder(tmp_path: Path) -> None:
    """A run folder below a file gives a one-line error."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir=\S+run: cannot be written \(Not a directory\)"):
        open_run_folder(tmp_path / "file" / "run", "a: 1\n", 0)
