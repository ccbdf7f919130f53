"""Tests of the status file and of the detection of crash loops."""

import json
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from metaformer.goodput import Goodput
from metaformer.tracking.status import DONE, FAILED, INTERRUPTED, StatusFile


def written(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return {name: value for name, value in content.items() if name in ("state", "step", "reason")}


def test_state_of_a_run(tmp_path: Path) -> None:
    """Both files have the same state, while the run lasts and after it has ended."""
    copy = tmp_path / "copy.json"
    status = StatusFile(tmp_path, copy, Goodput())
    status.start(7, 5)
    assert written(tmp_path / "status.json") == {"state": "running", "step": 7, "reason": ""}
    status.end(INTERRUPTED, 9, "SIGTERM")
    assert written(tmp_path / "status.json") == {"state": "interrupted", "step": 9, "reason": "SIGTERM"}
    assert copy.read_text() == (tmp_path / "status.json").read_text()


def begin(run_dir: Path, step: int, end: str | None = None, max_failed_starts: int = 3) -> None:
    """Record a start, and an end unless the run is killed (`end=None`)."""
    status = StatusFile(run_dir, None, Goodput())
    status.start(step, max_failed_starts)
    if end is not None:
        status.end(end, step + 4, "KeyError: 'x'" if end == FAILED else "")


@pytest.mark.parametrize(("end", "reason"), [(None, "killed"), (FAILED, "KeyError: 'x'")])
def test_a_crash_loop_ends(tmp_path: Path, end: str | None, reason: str) -> None:
    """After three killed or failed starts at step 5, every further start is rejected with the last reason."""
    for _ in range(3):
        begin(tmp_path, 5, end)
    for _ in range(2):
        with pytest.raises(UserError, match=r"3 starts in a row .* after step 5 \(the last: (.*)\); fix") as caught:
            begin(tmp_path, 5, end)
        assert f"(the last: {reason})" in str(caught.value)
    (tmp_path / "status.json").unlink()
    begin(tmp_path, 5, end)


@pytest.mark.parametrize("end", [INTERRUPTED, DONE])
def test_other_ends_do_not_count_as_crashes(tmp_path: Path, end: str) -> None:
    """Interrupted or completed starts are never rejected, and they reset the count of crashes."""
    begin(tmp_path, 5)
    begin(tmp_path, 5)
    for _ in range(5):
        begin(tmp_path, 5, end)
    begin(tmp_path, 5)
    begin(tmp_path, 5)
    begin(tmp_path, 5)


def test_progress_resets_the_count(tmp_path: Path) -> None:
    """A start at a later step resets the count of crashes."""
    for step in (5, 5, 5, 8, 8, 8, 9):
        begin(tmp_path, step)
    begin(tmp_path, 9)
    begin(tmp_path, 9)
    with pytest.raises(UserError, match="after step 9"):
        begin(tmp_path, 9)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"time": 1, "state": "running", "more": 2}'])
def test_a_damaged_file(tmp_path: Path, content: str) -> None:
    """A damaged file gives a one-line error that says to remove it."""
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json: damaged \(.*\); remove it to start again") as caught:
        begin(tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At the start this is an error that names the file; at the end, a warning, and the other file is written."""
    copy = tmp_path / "gone" / "copy.json"
    with pytest.raises(UserError, match=r"gone/copy\.json: cannot be written \(No such file or directory\)"):
        StatusFile(tmp_path, copy, Goodput()).start(0, 5)
    copy.parent.mkdir()
    status = StatusFile(tmp_path, copy, Goodput())
    status.start(0, 5)
    copy.unlink()
    copy.parent.rmdir()
    status.end(DONE, 3, "")
    assert written(tmp_path / "status.json")["state"] == "done"
    assert capfd.readouterr().err == f"warning: {copy}: cannot be written (No such file or directory)\n"


def test_fused_parts_are_recorded(tmp_path: Path) -> None:
    """The fused parts stay in the file after the end; an older file without this field can be read."""
    status = StatusFile(tmp_path, None, Goodput())
    status.start(0, 5, "blocks on (Triton); transform on (Triton)")
    status.end("failed", 0, "")
    content = json.loads((tmp_path / "status.json").read_text())
    assert content.pop("fused") == "blocks on (Triton); transform on (Triton)"
    (tmp_path / "status.json").write_text(json.dumps(content))
    StatusFile(tmp_path, None, Goodput()).start(0, 5, "off")
    assert json.loads((tmp_path / "status.json").read_text())["starts_without_progress"] == 1
