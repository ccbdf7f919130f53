"""A dry run on two ranks."""

from pathlib import Path

import pytest

from tests.conftest import QUICK, TRAIN_IMAGES, launch

MODEL = ("model=timm", "model.name=test_resnet", "model.drop_path_rate=null")


def test_two_ranks(images: Path, tmp_path: Path) -> None:
    """Both ranks take part, the result is printed once, and nothing is written."""
    options = (*QUICK, *MODEL, "epochs=3", "dry_run=true", f"run_dir={tmp_path / 'run'}")
    done = launch("train", f"data.root={images}", *options, ranks=2)
    assert done.code == 0, done.stderr
    assert done.stdout.count('"dry_run"') == 1
    assert done.result["rank_hours"] * 1800 == pytest.approx(done.result["seconds"])
    assert done.result["steps"] == 3 * TRAIN_IMAGES // 8
    assert "2 x CPU" in done.stdout
    assert list(tmp_path.iterdir()) == []
