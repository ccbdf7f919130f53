"""Test `last` and `best` as links, as files without link support, as copied folders, and damaged."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaformer.errors import UserError
from metaformer.training.checkpoint import find_weights
from metaformer.training.pointers import follow, read_pointer
from metaformer.training.saver import CheckpointSaver
from tests.training.conftest import advance, tiny_state
from tests.training.test_checkpoint import Checkpoints, names, save_steps
from tests.training.test_checkpoint_choice import flip


def failing_call(number: int) -> Callable[..., Any]:
    """Return a stand-in for a system call that fails with this error number."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def as_link(pointer: Path) -> None:
    """Leave the pointer as it is, a link."""


def as_file(pointer: Path) -> None:
    name = pointer.readlink().name
    pointer.unlink()
    pointer.write_text(f"{name}\n")


def as_copy(pointer: Path) -> None:
    """Replace the pointer by a copy of its target, as `cp -rL` does."""
    shutil.copytree(pointer.resolve(), pointer.with_name("copy"))
    pointer.unlink()
    pointer.with_name("copy").rename(pointer)


@pytest.mark.parametrize("form", [as_link, as_file, as_copy])
def test_every_form_is_read_and_replaced(
    tmp_path: Path, checkpoints: Checkpoints, form: Callable[[Path], None]
) -> None:
    """A run with pointers of any form resumes, is found and saves, after which they are links without leftovers."""
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    state = save_steps(checkpoints(), 1, 2, 3, best=2)
    weights = {step: (folder / f"step-{step:08d}" / "model.safetensors").read_bytes() for step in (2, 3)}
    for name in ("last", "best"):
        form(folder / name)

    found = checkpoints().find()
    assert found.skipped == ()
    assert found.folder is not None
    assert (found.folder / "model.safetensors").read_bytes() == weights[3]
    for source, step in ((run, 2), (folder / "last", 3), (folder / "last" / "model.safetensors", 3)):
        assert find_weights("checkpoint", source, use_ema=False).read_bytes() == weights[step]
    assert [aliases for _, aliases in sorted(checkpoints().aliases().items())] in ([["best"], ["latest"]],
                                                                                   [["latest"], ["best"]])  # fmt: skip

    for step in (4, 5):
        advance(state, 1)
        checkpoints().save(state.snapshot(), f"step-{step:08d}", is_best=step == 4)
    assert names(folder) == ["best", "last", "step-00000004", "step-00000005"]
    assert [(folder / name).readlink().name for name in ("best", "last")] == ["step-00000004", "step-00000005"]


def test_a_file_system_without_links(tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without symbolic links, as on SMB and exFAT, pointers are files that work like links."""
    monkeypatch.setattr(os, "symlink", failing_call(errno.EPERM))
    folder = tmp_path / "run" / "checkpoints"
    checkpoints().probe(0)
    save_steps(checkpoints(), 1, 2, 3, 4, best=1)
    assert names(folder) == ["best", "last", "step-00000001", "step-00000003", "step-00000004"]
    assert (folder / "last").read_text() == "step-00000004\n"
    assert checkpoints().find().folder == folder / "step-00000004" == read_pointer(folder / "last")
    assert follow(folder / "best" / "model.safetensors") == folder / "step-00000001" / "model.safetensors"
    pointed = {path.name: aliases for path, aliases in checkpoints().aliases().items()}
    assert pointed == {"step-00000004": ["latest"], "step-00000001": ["best"]}


def outside(pointer: Path) -> None:
    pointer.symlink_to(pointer.parents[2] / "other" / "step-00000009")


def another_name(pointer: Path) -> None:
    pointer.symlink_to("last")


def text(pointer: Path) -> None:
    pointer.write_text("../../other\n")


def binary(pointer: Path) -> None:
    pointer.write_bytes(b"\xff\x00" * 20)


def large(pointer: Path) -> None:
    pointer.write_bytes(bytes(1000))


def pipe(pointer: Path) -> None:
    os.mkfifo(pointer)


@pytest.mark.parametrize("damage", [outside, another_name, text, binary, large, pipe])
def test_a_damaged_pointer(tmp_path: Path, checkpoints: Checkpoints, damage: Callable[[Path], None]) -> None:
    """A damaged pointer is skipped with a message and replaced at the next save; files elsewhere stay unchanged."""
    other = tmp_path / "other" / "step-00000009"
    state = save_steps(checkpoints(), 1, 2)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000001", other)
    (folder / "last").unlink()
    damage(folder / "last")
    found = checkpoints().find()
    assert found.folder == folder / "step-00000002"
    (line,) = found.skipped
    assert line.startswith(f"{folder / 'last'}: damaged: it ")
    assert line.endswith("; it is replaced at the next save")
    assert checkpoints().aliases() == {}
    advance(state, 1)
    checkpoints().save(state.snapshot(), "step-00000003", is_best=False)
    assert names(folder) == ["last", "step-00000002", "step-00000003"]
    assert checkpoints().find() == (folder / "step-00000003", ())
    assert names(other) == ["ema.safetensors", "manifest.json", "model.safetensors", "trainer.pt"]


def test_no_copy_is_lost(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """A folder in place of a pointer is renamed to its checkpoint's name if that is missing.

    It is kept under another name if that checkpoint is damaged, or if the folder is not a checkpoint.
    """
    state = save_steps(checkpoints(keep=9), 1, 2)
    folder = tmp_path / "run" / "checkpoints"
    expected = {"last", "step-00000001", "step-00000002"}
    state.progress.steps_in_epoch = 1
    for step, prepare in enumerate(("gone", "damaged", "folder"), 3):
        advance(state, 1)
        saved = checkpoints(keep=9).save(state.snapshot(), f"step-{step:08d}", is_best=False)
        as_copy(folder / "last")
        if prepare == "gone":
            shutil.rmtree(saved)
        elif prepare == "damaged":
            flip(saved / "trainer.pt")
            expected.add("last.replaced")
        else:
            shutil.rmtree(folder / "last")
            (folder / "last").mkdir()
            expected.add("last.replaced-2")
        checkpoints(keep=9).save(state.snapshot(), "epoch-001", is_best=False)
        expected |= {f"step-{step:08d}", "epoch-001"}
        assert set(names(folder)) == expected
        assert (folder / "last").readlink() == Path("epoch-001")
    assert set(names(folder / "last.replaced")) == set(names(folder / "step-00000003"))


def test_a_pointer_that_cannot_be_replaced(
    tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the pointer that cannot be replaced, rather than a full disk."""
    state, saver = tiny_state(), CheckpointSaver(checkpoints(), checkpoints()._config, lambda line: None)
    last = tmp_path / "run" / "checkpoints" / "last"
    replace = Path.replace

    def refuse_last(self: Path, target: Path) -> Path:
        if target == last:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(self), None, str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_last)
    saver.save(state, "epoch-001", is_best=False)
    with pytest.raises(UserError) as caught:
        saver.wait(must_succeed=True)
    saver.close()
    expected = f"checkpoint epoch-001: cannot be written (Operation not permitted); check {last}; the same command"
    assert str(caught.value).startswith(expected)


def test_a_clock_that_is_set_back(tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the clock is set back by 30 days, the checkpoints of the last steps still count as newest."""
    state = save_steps(checkpoints(), 10, 20)
    folder = tmp_path / "run" / "checkpoints"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 30 * 86400)
    for step in (30, 35):
        advance(state, step - state.progress.step)
        checkpoints().save(state.snapshot(), f"step-{step:08d}", is_best=False)
        assert checkpoints().find().folder == folder / f"step-{step:08d}"
    assert names(folder) == ["last", "step-00000030", "step-00000035"]
    (folder / "last").unlink()
    assert checkpoints().find().folder == folder / "step-00000035"


@pytest.mark.parametrize(
    ("call", "number", "expected"),
    [
        (
            "fsync",
            errno.EINVAL,
            r"^run_dir: fsync fails in \S+run \(Invalid argument\), which saving needs; give a run",
        ),
        ("replace", errno.ENOTSUP, r"^run_dir: renaming a file over another fails in \S+run \(Operation not supported"),
        ("rename", errno.EACCES, r"^run_dir: renaming a folder fails in \S+run \(Permission denied\)"),
        ("mkdir", errno.EROFS, r"^run_dir: making a folder fails in \S+run \(Read-only file system\)"),
    ],
)
def test_a_folder_that_cannot_hold_a_run(
    tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, call: str, number: int, expected: str
) -> None:
    """Operations that a save needs but the file system lacks are named before the first step; no files remain."""
    monkeypatch.setattr(os, call, failing_call(number))
    with pytest.raises(UserError, match=expected):
        checkpoints().probe(0)
    monkeypatch.undo()
    assert names(tmp_path / "run") == []


def test_room_for_checkpoints(tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space for two checkpoints is required at the first start and for one on resuming, unless the size is unknown."""
    size = tiny_state().size()
    usage = shutil.disk_usage(tmp_path)
    room = 2 * size - 1

    def disk_usage(path: Path) -> Any:
        return usage._replace(free=room)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match=r"^run_dir: 0 MiB are free in \S+run, and 2 checkpoints of about 0 MiB must"):
        checkpoints().probe(size)
    state = save_steps(checkpoints(), 1)
    checkpoints().probe(size)
    assert abs(state.size() - size) < 100, "the estimate before the first step"
    room = size - 1
    with pytest.raises(UserError, match=r"and 1 checkpoint of about"):
        checkpoints().probe(size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))
    checkpoints().probe(size)
