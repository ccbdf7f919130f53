"""Tests of the reports about fused operators, when they are used and when their check fails."""

import json
from pathlib import Path

import pytest

from tests.conftest import QUICK, Finished, launch


def fused_lines(done: Finished) -> list[str]:
    """Return the output lines about fused operators, without the result."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("{")]
    return [line for line in lines if line.startswith("fused ")]


def test_fused_operators_are_reported(images: Path, tmp_path: Path) -> None:
    """The first lines, status.json and the result report what computes."""
    done = launch("train", f"data.root={images}", "max_steps=1", f"run_dir={tmp_path}", *QUICK)
    assert done.code == 0, done.stderr
    expected = "blocks on (in plain torch on a CPU); transform off (a CPU)"
    assert fused_lines(done) == [f"fused        {expected}"]
    assert done.result["fused"] == expected
    assert json.loads((tmp_path / "status.json").read_text())["fused"] == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_check_that_fails(images: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed check is reported once, with its reason and rank; all ranks use the plain path and agree."""
    monkeypatch.setenv("FAULTY_RANK", str(ranks - 1))
    program, run_dir = "tests/end_to_end/wrong_kernels", tmp_path / "run"
    common = (f"data.root={images}", "image_size=32", "workers=1", "precision=fp32")
    plain = (*common, *QUICK, "max_steps=2", "guards.compare_ranks_every_steps=1")
    done = launch(program, "train", *plain, f"run_dir={run_dir}", ranks=ranks)
    assert done.code == 0, done.stderr
    (line,) = fused_lines(done)
    start = "blocks off (rank 1: they differ from the plain path by " if ranks == 2 else "blocks off (they differ from "
    assert line.startswith(f"fused        {start}")
    assert done.result["fused"].startswith(start)
    assert json.loads((run_dir / "status.json").read_text())["fused"] == done.result["fused"]
    validated = launch(program, "validate", *common, f"checkpoint={run_dir}", ranks=ranks)
    assert validated.code == 0, validated.stderr
    assert validated.result["fused"].startswith(start.removeprefix("blocks "))
    assert validated.result["loss"] == pytest.approx(done.result["loss"], rel=1e-6)
