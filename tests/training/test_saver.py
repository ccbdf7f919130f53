"""Test background saves: what is saved, when training waits, and what happens when a disk fails."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metaformer.errors import Diverged, UserError
from metaformer.models import load_weights, save_state
from metaformer.training.checkpoint import CheckpointFolder, WeightFiles
from metaformer.training.config import CheckpointConfig
from metaformer.training.saver import CheckpointSaver
from metaformer.training.state import TrainState
from tests.ranks import fill, small_disk
from tests.training.conftest import advance, tensors, tiny_state

MOMENT = 0.3  # seconds after which a call that does not wait would have returned


class SlowDisk:
    """A disk whose writes do not finish until `release` is called, implemented with a pipe that nobody reads."""

    def __init__(self, pipe: Path) -> None:
        self._pipe = pipe
        os.mkfifo(pipe)

    def save(self, state: dict[str, Tensor], path: Path) -> None:
        save_state(state, path, "tiny")
        with self._pipe.open("wb"):
            pass

    def release(self) -> None:
        with self._pipe.open("rb"):
            pass


def make_saver(
    run: Path, lines: list[str], save: Callable[[dict[str, Tensor], Path], None] | None = None, **config: int | bool
) -> CheckpointSaver:
    """Return a real saver for RUN/checkpoints whose alarms are appended to `lines`."""
    run.mkdir(exist_ok=True)
    settings = CheckpointConfig(**config)  # type: ignore[arg-type]
    weight_files = WeightFiles(save or partial(save_state, network="tiny"), load_weights)
    folder = CheckpointFolder(run / "checkpoints", settings, {"model": "tiny"}, weight_files)
    return CheckpointSaver(folder, settings, lines.append)


def load_last(saver: CheckpointSaver) -> TrainState:
    """Return a new state, loaded from the run's last checkpoint."""
    found = saver.folder.find().folder
    assert found is not None
    state = tiny_state(ema=False)
    saver.folder.load(state, found)
    return state


def test_training_continues_during_a_write(tmp_path: Path) -> None:
    """`save` returns before the write is complete, and saves the state at the time of the call."""
    disk, state = SlowDisk(tmp_path / "pipe"), tiny_state(ema=False)
    saver = make_saver(tmp_path / "run", [], disk.save)
    advance(state, 2)
    weights = tensors(state.model)
    moments = [{k: v.clone() for k, v in entry.items()} for entry in state.optimizer.state_dict()["state"].values()]
    saver.save(state, "step-00000002", is_best=True)
    advance(state, 3)
    assert saver.folder.find().folder is None, "it must not exist yet"
    disk.release()
    saver.wait()
    found = load_last(saver)
    assert found.progress.step == 2
    torch.testing.assert_close(found.model.state_dict(), weights, rtol=0, atol=0)
    restored = list(found.optimizer.state_dict()["state"].values())
    torch.testing.assert_close(restored, moments, rtol=0, atol=0)
    assert not torch.equal(state.model.state_dict()["0.weight"], weights["0.weight"])
    saver.close()


@pytest.mark.parametrize("then", ["save", "wait", "close", "in the foreground"])
def test_calls_that_wait_for_the_write(tmp_path: Path, then: str) -> None:
    """The next save, waiting, closing, and any save with background=false wait for the write."""
    disk, state = SlowDisk(tmp_path / "pipe"), tiny_state(ema=False)
    saver = make_saver(tmp_path / "run", [], disk.save, background=then != "in the foreground")
    calls = {
        "save": lambda: saver.save(state, "step-00000002", is_best=False),
        "wait": saver.wait,
        "close": saver.close,
        "in the foreground": lambda: saver.save(state, "step-00000001", is_best=False),
    }
    if then != "in the foreground":
        saver.save(state, "step-00000001", is_best=False)
    waiting = threading.Thread(target=calls[then])
    waiting.start()
    waiting.join(MOMENT)
    assert waiting.is_alive()
    assert saver.folder.find().folder is None
    disk.release()
    waiting.join(20)
    assert not waiting.is_alive()
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()
    if then == "save":
        disk.release()
    saver.close()


@pytest.mark.parametrize("background", [True, False])
def test_failures_in_a_row(tmp_path: Path, background: bool) -> None:
    """If the run folder is gone, failed saves give an alarm, the third an error, and the folder is not recreated."""
    lines: list[str] = []
    saver, state = make_saver(tmp_path / "run", lines, background=background), tiny_state(ema=False)
    shutil.rmtree(tmp_path / "run")
    for step in (1, 2, 3):
        saver.save(state, f"step-{step:08d}", is_best=False)
    assert [line.split(" (")[0] for line in lines] == [
        f"ALARM        checkpoint step-0000000{step} could not be written" for step in (1, 2)
    ]
    assert lines[1].endswith("(No such file or directory); failure 2 in a row; training stops after 3")
    with pytest.raises(UserError, match=r"^checkpoint step-00000003: cannot be written \(No such file or directory\)"):
        saver.save(state, "step-00000004", is_best=False)
    assert not (tmp_path / "run").exists()
    saver.close()


@pytest.mark.parametrize("background", [True, False])
def test_the_last_save_must_succeed(tmp_path: Path, background: bool) -> None:
    """At the end of training the first failure is an error, because otherwise the run would seem saved."""
    lines: list[str] = []
    saver = make_saver(tmp_path / "run", lines, background=background)
    shutil.rmtree(tmp_path / "run")
    saver.save(tiny_state(ema=False), "step-00000001", is_best=False)
    with pytest.raises(UserError, match=r"^checkpoint step-00000001: cannot be written"):
        saver.wait(must_succeed=True)
    assert lines == []
    saver.close()


def test_full_disk(tmp_path: Path) -> None:
    """A full disk gives alarms and keeps the previous checkpoint; a later successful save resets the count."""
    lines: list[str] = []
    with small_disk(tmp_path / "disk", "256k") as disk:
        saver, state = make_saver(disk / "run", lines), tiny_state(ema=False)
        advance(state, 1)
        saver.save(state, "step-00000001", is_best=False)
        saver.wait()
        for step in (2, 4):
            filler = fill(disk)
            for failing in (step, step + 1):
                saver.save(state, f"step-{failing:08d}", is_best=True)
                saver.wait()
            found = saver.folder.find()
            assert found.folder is not None
            assert found.folder.name in ("step-00000001", "step-00000009")
            assert found.skipped == ()
            load_last(saver)
            filler.unlink()
            saver.save(state, "step-00000009", is_best=False)
            saver.wait(must_succeed=True)
        assert [line.partition("; ")[2] for line in lines] == [
            f"failure {number} in a row; training stops after 3" for number in (1, 2, 1, 2)
        ]
        assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == [
            "last", "step-00000001", "step-00000009",
        ]  # fmt: skip
        saver.close()


def test_the_lock_is_checked(tmp_path: Path) -> None:
    """The lock is checked before each save: a message is logged, and nothing is saved if another run holds the lock."""
    lines: list[str] = []
    answers = iter([None, "taken again", UserError("another run")])

    def check_lock() -> str | None:
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    folder, state = make_saver(tmp_path / "run", []).folder, tiny_state(ema=False)
    saver = CheckpointSaver(folder, CheckpointConfig(), lines.append, check_lock)
    for step in (1, 2):
        saver.save(state, f"step-{step:08d}", is_best=False)
    with pytest.raises(UserError, match="another run"):
        saver.save(state, "step-00000003", is_best=False)
    saver.close()
    assert lines == ["taken again"]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["last", "step-00000001", "step-00000002"]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """Weights that are not finite are not saved, the error names the tensor, and `last` is unchanged."""
    saver, state = make_saver(tmp_path / "run", []), tiny_state(ema=False)
    advance(state, 1)
    saver.save(state, "step-00000001", is_best=True)
    state.model.state_dict()["0.bias"][1] = float("nan")
    saver.save(state, "step-00000002", is_best=True)
    with pytest.raises(Diverged, match=r"^checkpoint step-00000002: not written: 0\.bias is not finite; "):
        saver.wait()
    assert [path.name for path in saver.folder.aliases()] == ["step-00000001"]
    saver.close()


def test_nothing_to_wait_for(tmp_path: Path) -> None:
    """Without a save in progress, waiting returns at once without an error."""
    saver = make_saver(tmp_path / "run", [])
    began = time.monotonic()
    saver.wait()
    saver.save(tiny_state(ema=False), "step-00000001", is_best=False)
    saver.wait(must_succeed=True)
    saver.wait(must_succeed=True)
    saver.close()
    assert time.monotonic() - began < 10
