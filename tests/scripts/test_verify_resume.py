"""Test verify_resume.py from the command line."""

import re
import sys
from pathlib import Path

import pytest

from scripts import verify_resume
from tests.conftest import QUICK, launch

TINY = (
    *(option for option in QUICK if not option.startswith(("tracking=", "log_every_steps="))),
    "workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null",
)  # fmt: skip


def test_a_killed_run_ends_as_the_undisturbed_one(images: Path, tmp_path: Path) -> None:
    """A run that is killed and resumed is equal in each part, and both run folders are removed."""
    options = ("--steps=8", f"--folder={tmp_path}", "--", f"data.root={images}", *TINY, "epochs=2", "ema=enabled")
    done = launch("scripts/verify_resume", *options)
    assert done.code == 0, done.stdout + done.stderr
    assert re.search("killed; the run resumes from (step|epoch)-[0-9]+", done.stderr), done.stderr
    found = re.findall(r"(\w+) +\W ([0-9a-f]{16}) +\W ([0-9a-f]{16}) +\W (equal|DIFFERENT)", done.stdout)
    parts = {"model", "ema", "optimizer", "scaler", "progress", "loss_sum", "skips", "metrics"}
    assert {name for name, *_ in found} == parts
    assert all(one == other and verdict == "equal" for _, one, other, verdict in found)
    assert list(tmp_path.iterdir()) == []


def test_failures_at_random(images: Path, tmp_path: Path) -> None:
    """After two random kills, the runs are equal to the undisturbed one, and the cost is reported."""
    options = ("--steps=100", "--failures=2", "--mean-seconds=4", f"--folder={tmp_path}", "--", f"data.root={images}")
    done = launch("scripts/verify_resume", *options, *TINY, "workers=1", "epochs=9", "ema=enabled", fresh=True)
    assert done.code == 0, done.stdout + done.stderr
    assert re.search(r"^run 1: equal bit for bit; goodput [0-9.]+ %, starts: \d+", done.stdout, re.MULTILINE)
    assert re.search(r"^2 failures \(", done.stdout, re.MULTILINE)
    assert re.search(r"^\d+ runs, of which 0 differ", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_each_run_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run is hashed once, because that reads whole checkpoints; differing parts are named, with exit code 1."""
    hashed = []

    def hash_run(run_dir: Path) -> dict[str, str]:
        hashed.append(run_dir.name)
        return {"model": "0" * 64, "ema": "1" * 64, "metrics": run_dir.name.ljust(64)}

    for name in ("_train", "_train_and_kill"):
        monkeypatch.setattr(verify_resume, name, lambda arguments, run_dir: None)
    monkeypatch.setattr(verify_resume, "hash_run", hash_run)
    monkeypatch.setattr(sys, "argv", ["verify_resume.py", f"--folder={tmp_path}", "--", "model=poolformer_s12"])
    with pytest.raises(SystemExit) as caught:
        verify_resume.main()
    assert caught.value.code == 1
    assert hashed == ["whole", "killed"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "DIFFERENT" in line] == ["metrics"]
    assert len([line for line in lines if "equal" in line]) == 2


def test_reserved_overrides_are_refused() -> None:
    """Overrides that the script sets itself give a one-line error before anything is trained."""
    done = launch("scripts/verify_resume", "--", "run_dir=elsewhere")
    assert (done.code, done.stderr) == (2, "error: run_dir=: set by this program; remove it\n")
