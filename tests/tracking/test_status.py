"""The status file: how a run stands, for others, and when a crash loop ends."""

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


def test_says_how_a_run_stands(tmp_path: Path) -> None:
    """While it runs, and how it ended, in both files alike."""
    copy = tmp_path / "copy.json"
    status = StatusFile(tmp_path, copy, Goodput())
    status.start(7, 5)
    assert written(tmp_path / "status.json") == {"state": "running", "step": 7, "reason": ""}
    status.end(INTERRUPTED, 9, "SIGTERM")
    assert written(tmp_path / "status.json") == {"state": "interrupted", "step": 9, "reason": "SIGTERM"}
    assert copy.read_text() == (tmp_path / "status.json").read_text()


def begin(run_dir: Path, step: int, end: str | None = None, most: int = 3) -> None:
    """A start, and an end unless it is killed."""
    status = StatusFile(run_dir, None, Goodput())
    status.start(step, most)
    if end is not None:
        status.end(end, step + 4, "KeyError: 'x'" if end == FAILED else "")


@pytest.mark.parametrize(("end", "reason"), [(None, "killed"), (FAILED, "KeyError: 'x'")])
def test_a_crash_loop_ends(tmp_path: Path, end: str | None, reason: str) -> None:
    """Three starts at step 5 that were killed, or failed: the fourth is refused, saying why, again and again."""
    for _ in range(3):
        begin(tmp_path, 5, end)
    for _ in range(2):
        with pytest.raises(UserError, match=r"3 starts in a row .* after step 5 \(the last: (.*)\); mend") as caught:
            begin(tmp_path, 5, end)
        assert f"(the last: {reason})" in str(caught.value)
    (tmp_path / "status.json").unlink()
    begin(tmp_path, 5, end)


@pytest.mark.parametrize("end", [INTERRUPTED, DONE])
def test_ends_that_are_no_crashes_do_not_count(tmp_path: Path, end: str) -> None:
    """Preempted at each start, or started again when complete: never refused; crashes before are forgotten."""
    begin(tmp_path, 5)
    begin(tmp_path, 5)
    for _ in range(5):
        begin(tmp_path, 5, end)
    begin(tmp_path, 5)
    begin(tmp_path, 5)
    begin(tmp_path, 5)


def test_progress_forgets_crashes(tmp_path: Path) -> None:
    """A start at a later step counts from 0."""
    for step in (5, 5, 5, 8, 8, 8, 9):
        begin(tmp_path, step)
    begin(tmp_path, 9)
    begin(tmp_path, 9)
    with pytest.raises(UserError, match="after step 9"):
        begin(tmp_path, 9)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"time": 1, "state": "running", "more": 2}'])
def test_a_damaged_file(tmp_path: Path, content: str) -> None:
    """One line that says to remove it."""
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json: damaged \(.*\); remove it to start again") as caught:
        begin(tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At the start it is an error that names the very file; at the end a warning, and the other file is written."""
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


def test_what_computes_is_kept(tmp_path: Path) -> None:
    """Which fused parts a start uses, also after its end; a file from before there was this field is read."""
    status = StatusFile(tmp_path, None, Goodput())
    status.start(0, 5, "blocks on (Triton); transform on (Triton)")
    status.end("failed", 0, "")
    content = json.loads((tmp_path / "status.json").read_text())
    assert content.pop("fused") == "blocks on (Triton); transform on (Triton)"
    (tmp_path / "status.json").write_text(json.dumps(content))
    StatusFile(tmp_path, None, Goodput()).start(0, 5, "off")
    assert json.loads((tmp_path / "status.json").read_text())["starts_without_progress"] == 1
