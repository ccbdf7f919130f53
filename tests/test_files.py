"""Tests of atomic writes, JSON output, and checks of output and cache folders."""

import json
import math
import os
import pwd
import subprocess
import tempfile
from pathlib import Path

import pytest

from metaformer.errors import UserError
from metaformer.files import cache_folder, check_output, to_json, write_atomically, write_text_atomically


def test_replaces_in_one_step(tmp_path: Path) -> None:
    """The old content stays until the new is complete; no temporary file remains."""
    path = tmp_path / "file"
    for content in ("old", "new"):

        def write(temporary: Path, content: str = content) -> None:
            temporary.write_text(content)
            assert temporary.parent == path.parent, "otherwise the rename could copy"
            assert not path.exists() or path.read_text() == "old"

        write_atomically(path, write)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_failure_keeps_the_old_content(tmp_path: Path) -> None:
    """If writing fails half-way, the old content is kept and no temporary file remains."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan() -> None:
    """NaN and infinity become null at any depth; everything else is unchanged."""
    plain = {"a": 1, "b": [1.5, None, True, "NaN"], "c": {"d": []}}
    assert json.loads(to_json(plain)) == plain
    figures = {"loss": math.nan, "rows": [{"top1": math.inf}, (-math.inf, 2.0)]}
    assert to_json(figures) == '{"loss": null, "rows": [{"top1": null}, [null, 2.0]]}'


def test_two_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers with equal process ids, as on two machines that share a folder, use different temporary files."""
    path = tmp_path / "file"
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def write(temporary: Path) -> None:
        temporary.write_text("first")
        write_text_atomically(path, "second")
        assert temporary.read_text() == "first"

    write_atomically(path, write)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_is_checked_before_the_work(tmp_path: Path) -> None:
    """Each unusable output gives a one-line error; usable outputs are not changed by the check."""
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        check_output("", tmp_path / name)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old", "old")]
    for file, reason in {
        tmp_path: "not a file", Path("/dev/null"): "not a file", tmp_path / "gone" / "x": "No such file or directory",
        tmp_path / "old" / "x": "Not a directory", tmp_path / ("x" * 300): "File name too long",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as caught:
            check_output(f"--json={file}", file)
        assert str(caught.value).startswith(f"--json={file}: cannot be written ({reason}); give another")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user unknown to this machine, as in a container; the fixture is the folder for temporary files."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_cache_without_a_home(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is private and the same at each start; one that another user has created or linked is rejected."""
    folder = cache_folder()
    assert folder == cache_folder() == homeless / f"metaformer-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(homeless)
    with pytest.raises(UserError, match=r"belongs to another user, .*; set XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(homeless / "given"))
    assert cache_folder() == homeless / "given" / "metaformer"


def test_only_cache_folder_uses_the_home_folder() -> None:
    """Path.home() raises an error without a home folder, so only `cache_folder` calls it."""
    sources = Path(__file__).parents[1]
    command = ["grep", "-rlE", r"Path\.home\(|\.expanduser\(\)", "--include=*.py", "src", "scripts"]
    found = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=True).stdout
    assert found.split() == ["src/metaformer/files.py"]
