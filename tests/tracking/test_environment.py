"""Tests of the description of the environment."""

import json
import subprocess
from pathlib import Path

import pytest

from metaformer.tracking import environment


def test_a_diff_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The diff of a changed Latin-1 file is kept with replacement characters and can be stored as JSON."""
    for command in (["init", "--quiet"], ["config", "user.name", "x"], ["config", "user.email", "x@example.org"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    file = tmp_path / "environment.py"
    file.write_bytes("# caf\u00e9\n".encode("latin-1"))
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", "commit", "--quiet", "-m", "first"], cwd=tmp_path, check=True)
    file.write_bytes("# th\u00e9\n".encode("latin-1"))
    monkeypatch.setattr(environment, "__file__", str(file))
    found = environment.describe_environment()
    assert len(found["git"]["commit"]) == 40
    assert "-# caf\ufffd\n+# th\ufffd\n" in found["git"]["diff"]
    json.dumps(found).encode()
