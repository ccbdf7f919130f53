"""Test of the reports about fused kernels."""

import json
from pathlib import Path

from tests.conftest import QUICK, launch


def test_what_computes_is_reported(images: Path, tmp_path: Path) -> None:
    """The first lines, status.json and the result say that a CPU uses no fused kernels, without a warning."""
    done = launch("train", f"data.root={images}", "max_steps=1", f"run_dir={tmp_path}", *QUICK)
    assert done.code == 0, done.stderr
    expected = "blocks off (CPU); transform off (CPU)"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("{")]
    assert [line for line in lines if "fused" in line] == [f"fused        {expected}"]
    assert done.result["fused"] == expected
    assert json.loads((tmp_path / "status.json").read_text())["fused"] == expected
