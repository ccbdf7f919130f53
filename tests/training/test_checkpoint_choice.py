"""Test which checkpoint a run resumes from if some are damaged, and which are kept."""

from functools import partial
from pathlib import Path

import pytest

from metaformer.errors import UserError
from metaformer.models import load_weights, save_state
from metaformer.training.checkpoint import CheckpointFolder, WeightFiles
from metaformer.training.config import CheckpointConfig
from tests.training.conftest import advance, tiny_state
from tests.training.test_checkpoint import Checkpoints, assert_same_state, names, save_steps

FILES = ["model.safetensors", "ema.safetensors", "trainer.pt", "manifest.json"]


def flip(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_in_the_last(checkpoints: Checkpoints, name: str) -> None:
    """If a bit of any file of `last` is flipped, the previous checkpoint is used, and a line names the damaged file."""
    state = save_steps(checkpoints(keep=3), 1, 2, 3)
    last = checkpoints().find().folder
    assert last is not None
    flip(last / name)
    found = checkpoints().find()
    assert found.folder == last.with_name("step-00000002")
    (line,) = found.skipped
    assert line.startswith(f"{last / name}: damaged")
    restored = tiny_state()
    checkpoints().load(restored, found.folder)
    assert restored.progress.step == 2

    advance(restored, 1)  # redo the step and save under the damaged checkpoint's name
    checkpoints().save(restored.snapshot(), "step-00000003", is_best=False)
    assert checkpoints().find() == (last, ())
    checkpoints().load(restored, last)
    assert_same_state(restored, state)


def test_falls_back_by_the_time_of_saving(checkpoints: Checkpoints) -> None:
    """After going back to step 1, step 2 counts as newer than steps 5 and 6 of the earlier attempt."""
    save_steps(checkpoints(keep=9), 1, 5, 6)
    state = tiny_state()
    advance(state, 2)
    second = checkpoints(keep=9).save(state.snapshot(), "step-00000002", is_best=False)
    advance(state, 1)
    last = checkpoints(keep=9).save(state.snapshot(), "step-00000003", is_best=False)
    for damaged, expected in ((last, second), (second, last.with_name("step-00000006"))):
        flip(damaged / "trainer.pt")
        assert checkpoints().find().folder == expected
    skipped = [line.split(": ")[0] for line in checkpoints().find().skipped]
    assert skipped == [str(folder / "trainer.pt") for folder in (last, second)]


def test_no_checkpoint_is_whole(checkpoints: Checkpoints) -> None:
    """If all checkpoints are damaged, a one-line error describes each damage instead of starting from scratch."""
    save_steps(checkpoints(), 1, 2)
    for name, damaged in (("step-00000001", "model.safetensors"), ("step-00000002", "manifest.json")):
        last = checkpoints().find().folder
        assert last is not None
        flip(last.with_name(name) / damaged)
    with pytest.raises(UserError, match=r": no checkpoint is complete \(") as caught:
        checkpoints().find()
    assert "step-00000001/model.safetensors: damaged" in str(caught.value)
    assert "step-00000002/manifest.json: damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_some_epochs_are_kept_forever(tmp_path: Path) -> None:
    """With keep=1 and keep_every_epochs=3, epochs 3 and 6 are kept besides the newest; checkpoints by step are not."""
    (tmp_path / "run").mkdir()
    config = CheckpointConfig(keep=1, keep_every_epochs=3)
    weight_files = WeightFiles(partial(save_state, network="tiny"), load_weights)
    checkpoints = CheckpointFolder(tmp_path / "run" / "checkpoints", config, {"model": "tiny"}, weight_files)
    state = tiny_state()
    for epoch in range(1, 8):
        checkpoints.save(state.snapshot(), f"step-{3 * epoch:08d}", is_best=False)
        checkpoints.save(state.snapshot(), f"epoch-{epoch:03d}", is_best=False)
    assert names(tmp_path / "run" / "checkpoints") == ["epoch-003", "epoch-006", "epoch-007", "last"]
