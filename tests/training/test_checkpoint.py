"""Test that checkpoints are complete, kept as configured, and never half-written."""

import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metaformer.errors import UserError
from metaformer.models import load_weights
from metaformer.training.checkpoint import CheckpointFolder, find_weights
from metaformer.training.config import CheckpointConfig
from metaformer.training.state import Best, TrainState
from tests.fork_server import context
from tests.training.conftest import advance, checkpoint_folder, tensors, tiny_network, tiny_state

Checkpoints = Callable[..., CheckpointFolder]
KILLS = 12
FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}  # events of sys.addaudithook


def save_steps(checkpoints: CheckpointFolder, *steps: int, best: int | None = None) -> TrainState:
    """Train to each of the steps, save there, and return the state."""
    state = tiny_state()
    for step in steps:
        advance(state, step - state.progress.step)
        checkpoints.save(state.snapshot(), f"step-{step:08d}", is_best=step == best)
    return state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_state(a: TrainState, b: TrainState) -> None:
    """Assert that two states are bit-identical."""
    for left, right in ((a.model, b.model), (a.ema, b.ema)):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(a.optimizer.state_dict(), b.optimizer.state_dict(), rtol=0, atol=0)
    assert a.progress == b.progress
    assert a.loss_sum == b.loss_sum


def test_restores_everything(checkpoints: Checkpoints) -> None:
    """Loading restores every part of the state, and further training gives the same weights."""
    state = tiny_state()
    advance(state, 3)
    state.progress.samples, state.progress.epochs_completed, state.progress.epoch_loss_sum = 24, 1, 2.5
    state.progress.best = Best(12.5, 1, "ema")
    state.progress.last_validation = {"kind": "validation", "top1": 12.5, "step": 3}
    folder = checkpoints().save(state.snapshot(), "epoch-001", is_best=True)
    assert names(folder) == ["ema.safetensors", "manifest.json", "model.safetensors", "trainer.pt"]

    restored = tiny_state()
    advance(restored, 1)  # its previous content does not matter
    checkpoints().load(restored, folder)
    assert_same_state(restored, state)
    for each in (state, restored):
        advance(each, 2)
    assert_same_state(restored, state)


def test_keeps_the_newest_the_best_and_the_last(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """With keep=2, the two newest checkpoints and the best are kept; all others are removed."""
    folder = tmp_path / "run" / "checkpoints"
    save_steps(checkpoints(keep=2), 1, 2, 3, 10, 11, best=2)
    assert names(folder) == ["best", "last", "step-00000002", "step-00000010", "step-00000011"]
    assert (folder / "last").readlink() == Path("step-00000011")
    assert (folder / "best").readlink() == Path("step-00000002")
    pointed = {path.name: aliases for path, aliases in checkpoints().aliases().items()}
    assert pointed == {"step-00000011": ["latest"], "step-00000002": ["best"]}


def test_keeps_the_last_after_going_back(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """After resuming from an older checkpoint, `last` is the one saved last, even at a lower step."""
    save_steps(checkpoints(keep=1), 5, 6)
    state = tiny_state()
    checkpoints(keep=1).save(state.snapshot(), "step-00000002", is_best=False)
    last = checkpoints().find().folder
    assert last is not None
    assert last.name == "step-00000002"
    checkpoints().load(tiny_state(), last)


def test_replaces_a_checkpoint_of_the_same_name(checkpoints: Checkpoints) -> None:
    """Saving under an existing name replaces the contents completely."""
    save_steps(checkpoints(), 4)
    state = tiny_state()
    advance(state, 9)
    folder = checkpoints().save(state.snapshot(), "step-00000004", is_best=False)
    restored = tiny_state()
    checkpoints().load(restored, folder)
    assert_same_state(restored, state)


@pytest.mark.parametrize("link", ["missing", "dangling"])
def test_falls_back_to_the_newest(tmp_path: Path, checkpoints: Checkpoints, link: str) -> None:
    """Without a valid `last`, the newest checkpoint is found by step, not by name."""
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints().find().folder is None, "there must be no checkpoint yet"
    state = tiny_state()
    advance(state, 2)
    checkpoints().save(state.snapshot(), "step-00000002", is_best=False)
    advance(state, 2)
    checkpoints().save(state.snapshot(), "epoch-001", is_best=False)
    (folder / "last").unlink()
    if link == "dangling":
        (folder / "last").symlink_to("epoch-009")
    assert checkpoints().find().folder == (folder / "epoch-001").resolve()


def test_manifest_with_fewer_fields(checkpoints: Checkpoints) -> None:
    """A checkpoint loads if its manifest, from an earlier version, lacks a field of the identity."""
    folder = checkpoints().save(tiny_state().snapshot(), "epoch-001", is_best=False)
    state = tiny_state()
    state.identity["image_size"] = 224
    checkpoints().load(state, folder)


@pytest.mark.parametrize("field", ["model", "seed", "global_batch_size", "data"])
def test_another_run_is_refused(checkpoints: Checkpoints, field: str) -> None:
    """A checkpoint of another network, seed, batch size or data set is refused by field name; nothing is loaded."""
    folder = checkpoints().save(tiny_state().snapshot(), "epoch-001", is_best=False)
    state = tiny_state()
    advance(state, 1)
    before = tensors(state.model)
    state.identity[field] = "other"
    with pytest.raises(UserError, match=rf"cannot resume: it was trained with {field}=\S+, this run has other;"):
        checkpoints().load(state, folder)
    torch.testing.assert_close(state.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer.pt", "manifest.json"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, None], ids=lambda share: f"first-{share}")
def test_damaged_files(checkpoints: Checkpoints, name: str, share: float | None) -> None:
    """A truncated file (or, with None, a missing one) gives a one-line error with its path."""
    folder = save_and_cut(checkpoints(), name, share)
    with pytest.raises(UserError) as caught:
        checkpoints().load(tiny_state(), folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def save_and_cut(checkpoints: CheckpointFolder, name: str, share: float | None) -> Path:
    """Save a checkpoint, then truncate one of its files to a share of its bytes, or remove it."""
    state = tiny_state()
    advance(state, 1)
    folder = checkpoints.save(state.snapshot(), "epoch-001", is_best=False)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if share is not None:
        (folder / name).write_bytes(content[: int(share * len(content))])
    return folder


class Canary:
    """Creates a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._file}",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """A trainer.pt that would run a command when unpickled gives a one-line error, and the command is not run."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "pickle itself must run the code"
    canary.unlink()
    folder = checkpoints().save(tiny_state().snapshot(), "epoch-001", is_best=False)
    torch.save({"optimizer": Canary(canary)}, folder / "trainer.pt")
    with pytest.raises(UserError, match=r"trainer\.pt: ") as caught:
        checkpoints().load(tiny_state(), folder)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_another_optimizer_is_refused(checkpoints: Checkpoints) -> None:
    """A checkpoint whose optimizer state does not match this run's parameters gives a one-line error."""
    folder = checkpoints().save(tiny_state().snapshot(), "epoch-001", is_best=False)
    contents = torch.load(folder / "trainer.pt", weights_only=True)
    del contents["optimizer"]["param_groups"][1]
    torch.save(contents, folder / "trainer.pt")
    with pytest.raises(UserError, match=r"trainer\.pt"):
        checkpoints().load(tiny_state(), folder)


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    """A run folder that is a file or does not exist is not created."""
    (tmp_path / "file").touch()
    for run, error in (("file", NotADirectoryError), ("gone", FileNotFoundError)):
        with pytest.raises(error):
            checkpoint_folder(tmp_path / run / "checkpoints").save(tiny_state().snapshot(), "epoch-001", is_best=False)


@pytest.mark.parametrize("limit", [100, 1200], ids=["weights", "trainer"])
def test_full_disk_keeps_the_previous(checkpoints: Checkpoints, limit: int) -> None:
    """If a file cannot be written completely, saving fails and the previous checkpoint still loads."""
    state = save_steps(checkpoints(), 1)
    advance(state, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|unexpected pos"):
            checkpoints().save(state.snapshot(), "step-00000002", is_best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_last_loads(checkpoints(), at_step=1)


def assert_last_loads(checkpoints: CheckpointFolder, at_step: int | None = None) -> int:
    """Assert that the last checkpoint is complete, and return its step."""
    last = checkpoints.find().folder
    assert last is not None
    state = tiny_state()
    checkpoints.load(state, last)
    assert at_step in (None, state.progress.step)
    return state.progress.step


def save_forever(folder: Path, started: Any) -> None:
    """Resume from the last checkpoint and save at every step until killed."""
    torch.set_num_threads(1)
    checkpoints, state = checkpoint_folder(folder, keep=1), tiny_state()
    last = checkpoints.find().folder
    if last is not None:
        checkpoints.load(state, last)
    while True:
        advance(state, 1)
        checkpoints.save(state.snapshot(), f"step-{state.progress.step:08d}", is_best=state.progress.step % 7 == 0)
        started.set()


def test_sigkill_never_breaks_the_last(tmp_path: Path) -> None:
    """A run that is killed at random moments while saving always resumes from a complete last checkpoint."""
    rng, folder, step = random.Random(0), tmp_path / "checkpoints", 0
    for _ in range(KILLS):
        started = context.Event()
        process = context.Process(target=save_forever, args=(folder, started))
        process.start()
        while not started.wait(0.05):
            assert process.is_alive(), f"saving failed after a kill at step {step}"
        time.sleep(rng.uniform(0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        reached = assert_last_loads(checkpoint_folder(folder))
        assert reached > step
        step = reached


def save_and_die(folder: Path, at: int) -> None:
    """Overwrite the checkpoint that `last` points to; SIGKILL this process before the given file system change."""
    checkpoints, state, changes = checkpoint_folder(folder, keep=1), tiny_state(), itertools.count()
    advance(state, 4)

    def kill(event: str, _: Any) -> None:
        if event in FILE_EVENTS and next(changes) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    checkpoints.save(state.snapshot(), "step-00000003", is_best=False)


def test_sigkill_at_each_moment_of_a_save(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """A run that is killed before any file system change of a save has a complete checkpoint, and can save again."""
    save_steps(checkpoints(keep=3), 1, 2, 3, best=1)
    template = tmp_path / "run" / "checkpoints"
    for at in itertools.count():
        folder = tmp_path / str(at)
        shutil.copytree(template, folder, symlinks=True)
        process = context.Process(target=save_and_die, args=(folder, at))
        process.start()
        process.join()
        reached = assert_last_loads(checkpoint_folder(folder))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        checkpoint_folder(folder, keep=1).save(tiny_state().snapshot(), "step-00000003", is_best=False)
    assert at > 10
    assert reached == 4
    assert names(folder) == ["best", "last", "step-00000001", "step-00000003"]


def test_half_removed_checkpoint_does_not_stop_training(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """A run can save next to remains of an interrupted removal or save, and removes those of the save."""
    state = save_steps(checkpoints(), 1, 2, 3)
    folder = tmp_path / "run" / "checkpoints"
    for remains in ("step-00000001", ".step-00000002.tmp"):
        (folder / remains).mkdir()
        (folder / remains / "trainer.pt").touch()
    advance(state, 1)
    checkpoints().save(state.snapshot(), "step-00000004", is_best=False)
    assert_last_loads(checkpoints(), at_step=4)
    assert not (folder / ".step-00000002.tmp").exists()


@pytest.mark.parametrize(
    ("saved", "part"), [(True, "it has an average of the weights; give ema=enabled"),
                        (False, "it has no average of the weights; give ema=disabled")],
)  # fmt: skip
def test_ema_must_match(checkpoints: Checkpoints, saved: bool, part: str) -> None:
    """A run with averaged weights does not resume without them, nor the reverse; nothing is loaded."""
    state = tiny_state(ema=saved)
    advance(state, 1)
    folder = checkpoints().save(state.snapshot(), "epoch-001", is_best=False)
    other = tiny_state(ema=not saved)
    before = tensors(other.model)
    with pytest.raises(UserError, match=f"{folder}: cannot resume: {part}, or start another run with init_weights="):
        checkpoints().load(other, folder)
    torch.testing.assert_close(other.model.state_dict(), before, rtol=0, atol=0)
    assert other.progress.step == 0


@pytest.fixture
def run_folder(tmp_path: Path, checkpoints: Checkpoints) -> Path:
    """Return the folder of a run without EMA, with its best checkpoint at step 1 and its last at step 2."""
    state = tiny_state(ema=False)
    for step in (1, 2):
        advance(state, 1)
        checkpoints().save(state.snapshot(), f"step-{step:08d}", is_best=step == 1)
    return tmp_path / "run"


def test_finds_weights(run_folder: Path) -> None:
    """A file, a checkpoint's weights, and a run folder's best or else last weights are found."""
    first, second = (run_folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in (1, 2))
    assert find_weights("checkpoint", second, use_ema=False) == second
    assert find_weights("checkpoint", second.parent, use_ema=False) == second
    assert find_weights("checkpoint", run_folder, use_ema=False).resolve() == first.resolve()
    load_weights(tiny_network(), find_weights("checkpoint", run_folder, use_ema=False))
    (run_folder / "checkpoints" / "best").unlink()
    assert find_weights("checkpoint", run_folder, use_ema=False).resolve() == second.resolve()


def test_missing_weights(tmp_path: Path, run_folder: Path) -> None:
    """Missing weights or averaged weights give an error that says which."""
    with pytest.raises(UserError, match=r"checkpoint=\S+nowhere: no file, and no checkpoint or run folder with model"):
        find_weights("checkpoint", tmp_path / "nowhere", use_ema=False)
    with pytest.raises(UserError, match=r"with ema\.safetensors"):
        find_weights("checkpoint", run_folder, use_ema=True)
    with pytest.raises(UserError, match=r"checkpoint=\S+nowhere"):
        find_weights("checkpoint", tmp_path / "nowhere", use_ema=True)


def test_manifest_content(run_folder: Path) -> None:
    """The manifest lists the files with their hashes, the network's name and the progress."""
    folder = run_folder / "checkpoints" / "last"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert {name: facts["sha256"] for name, facts in manifest["files"].items()} == hashes
    assert (manifest["model"], manifest["progress"]["step"]) == ("tiny", 2)


@pytest.mark.parametrize("field", ["every_epochs", "every_steps", "keep", "keep_every_epochs", "max_failed_saves"])
def test_config_is_checked(field: str) -> None:
    """0 is refused with the field's name."""
    with pytest.raises(UserError, match=rf"checkpoint\.{field}=0: must be at least 1"):
        CheckpointConfig(**{field: 0})  # type: ignore[arg-type]
