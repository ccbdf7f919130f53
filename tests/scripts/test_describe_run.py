"""Test describe_run.py on real run folders and on other paths."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import Diverged, UserError
from scripts import describe_run
from tests.conftest import QUICK, VAL_IMAGES

Run = Callable[..., dict[str, Any]]
Describe = Callable[[Path], str]
SMALL = (
    *(option for option in QUICK if not option.startswith("tracking=")),
    "workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null",
)  # fmt: skip


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Describe:
    """Return a function that runs the script on a folder and returns its stdout."""

    def run(folder: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["describe_run.py", str(folder)])
        capsys.readouterr()
        describe_run.main()
        return capsys.readouterr().out

    return run


def test_a_run(images: Path, tmp_path: Path, run_program: Run, describe: Describe) -> None:
    """The script prints the network, both results, and paths that exist."""
    run_dir = tmp_path / "run"
    options = ("epochs=2", "tracking=offline", f"run_dir={run_dir}")
    result = run_program("train", f"data.root={images}", *SMALL, *options)
    lines = describe(run_dir).splitlines()
    fields = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert fields["model"] == "test_resnet, 12 steps, 96 images seen"
    assert f"{result['top1']:.2f} % of {VAL_IMAGES}" in fields["top-1"]
    assert fields["best"] == f"{result['best_top1']:.2f} %, after epoch {result['best_epoch']}"
    assert Path(fields["weights"]).is_file()
    assert Path(fields["wandb"].split(";")[0]).is_dir()
    folder, files = fields["run"].removeprefix("folder ").strip().split(": ")
    assert folder == str(run_dir)
    assert {"metrics.jsonl", "summary.csv", "log.txt"} <= set(files.split(", "))
    (run_dir / "summary.csv").unlink()
    assert "summary.csv" not in describe(run_dir)


def test_a_run_that_was_never_validated(images: Path, tmp_path: Path, run_program: Run, describe: Describe) -> None:
    """A run that ended in its first epoch, after a checkpoint, has weights but no result."""
    run_dir = tmp_path / "run"
    options = ("epochs=1", "tracking=local", "schedule.warmup_epochs=0", "checkpoint.every_steps=1")
    with pytest.raises(Diverged):
        run_program("train", f"data.root={images}", *SMALL, *options, "optimizer.lr=1e18", f"run_dir={run_dir}")
    fields = {line.split()[0]: line.split(maxsplit=1)[1] for line in describe(run_dir).splitlines()}
    assert fields["model"].startswith("test_resnet, ")
    assert Path(fields["weights"]).is_file()
    assert not {"top-1", "best", "wandb"} & fields.keys()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_not_a_run(tmp_path: Path, describe: Describe, kind: str) -> None:
    """Any other path gives exit code 2 and a one-line error that names it."""
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.touch()
    with pytest.raises(UserError) as caught:
        describe(path)
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"{path}: not a run folder with a checkpoint"


def test_damaged_manifest(tmp_path: Path, describe: Describe) -> None:
    """A truncated manifest gives a one-line error that names it."""
    manifest = tmp_path / "checkpoints" / "last" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"model": "x", "prog')
    with pytest.raises(UserError, match=r"manifest\.json: ") as caught:
        describe(tmp_path)
    assert "\n" not in str(caught.value)
