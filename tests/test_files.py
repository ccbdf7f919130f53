"""Files that appear whole or not at all."""

import json
import math
import os
from pathlib import Path

import pytest

from metaformer.files import to_json, write_text_whole, write_whole


def test_replaces_in_one_step(tmp_path: Path) -> None:
    """While the new content is written the old is still there; then only the new is, and nothing temporary."""
    path = tmp_path / "file"
    for content in ("old", "new"):

        def write(temporary: Path, content: str = content) -> None:
            temporary.write_text(content)
            assert temporary.parent == path.parent, "else the rename would copy"
            assert not path.exists() or path.read_text() == "old"

        write_whole(path, write)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old(tmp_path: Path) -> None:
    """Where writing fails half-way, the old content and nothing temporary is left."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan() -> None:
    """Figures that JSON cannot say are null at any depth; everything else is as it was."""
    plain = {"a": 1, "b": [1.5, None, True, "NaN"], "c": {"d": []}}
    assert json.loads(to_json(plain)) == plain
    figures = {"loss": math.nan, "rows": [{"top1": math.inf}, (-math.inf, 2.0)]}
    assert to_json(figures) == '{"loss": null, "rows": [{"top1": null}, [null, 2.0]]}'


def test_two_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two machines that share a folder, process numbers may be equal: each writes to a file of its own."""
    path = tmp_path / "file"
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def write(temporary: Path) -> None:
        temporary.write_text("first")
        write_text_whole(path, "second")
        assert temporary.read_text() == "first"

    write_whole(path, write)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
