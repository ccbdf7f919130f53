"""Test the training state: counting, copying and restoring."""

import copy
import math

import pytest
import torch

from metaformer.training.config import OptimizerConfig
from metaformer.training.precision import Scaler
from metaformer.training.state import Best, TrainState
from tests.training.conftest import advance, tiny_state


def count(state: TrainState, loss: float, skipped: float) -> None:
    state.count(torch.tensor(loss, dtype=torch.float64), torch.tensor(skipped))


def test_counts_losses_and_skipped_steps() -> None:
    """Losses of skipped steps are not added, and a step that is taken resets the count of skips in a row."""
    state = tiny_state()
    expected = [(1.5, [0, 0]), (1.5, [1, 1]), (1.5, [2, 2]), (3.75, [2, 0]), (3.75, [3, 1])]
    steps = [(1.5, 0.0), (math.nan, 1.0), (math.inf, 1.0), (2.25, 0.0), (4.0, 1.0)]
    for (loss, skipped), (loss_sum, skips) in zip(steps, expected, strict=True):
        count(state, loss, skipped)
        assert float(state.loss_sum) == loss_sum
        assert state.skips.tolist() == skips
    assert state.loss_sum.dtype == torch.float64


def test_snapshot_is_a_copy() -> None:
    """Further training does not change a snapshot's weights, average, optimizer state, counters or progress."""
    state = tiny_state()
    advance(state, 2)
    state.progress.best, state.progress.last_validation = Best(50.0, 1, "ema"), {"top1": 50.0}
    snapshot = state.snapshot()
    before = copy.deepcopy(snapshot)
    advance(state, 1)
    count(state, 1.0, 1.0)
    state.progress.best.top1, state.progress.last_validation["top1"], state.identity["seed"] = 60.0, 60.0, 1
    torch.testing.assert_close(snapshot.weights, before.weights, rtol=0, atol=0)
    torch.testing.assert_close(snapshot.ema, before.ema, rtol=0, atol=0)
    for part in ("optimizer", "loss_sum", "skips"):
        torch.testing.assert_close(snapshot.trainer[part], before.trainer[part], rtol=0, atol=0)
    assert (snapshot.progress, snapshot.identity) == (before.progress, before.identity)
    assert (snapshot.progress["step"], snapshot.identity["seed"]) == (2, 0)
    assert not torch.equal(snapshot.weights["0.weight"], state.model.state_dict()["0.weight"])


def test_snapshot_of_a_run_without_average() -> None:
    """Without EMA, a snapshot has no average."""
    assert tiny_state(ema=False).snapshot().ema is None


@pytest.mark.parametrize(
    ("where", "name"),
    [("2.weight", "2.weight"), ("1.running_var", "1.running_var"), ("ema 0.bias", "ema 0.bias"), (None, None)],
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_finds_non_finite_values(where: str | None, name: str | None, wrong: float) -> None:
    """A single non-finite value in a weight, a buffer or the average is found, with the tensor's name."""
    state = tiny_state()
    assert state.ema is not None
    if where is not None:
        model = state.ema.module if where.startswith("ema ") else state.model
        model.state_dict()[where.removeprefix("ema ")].view(-1)[-1] = wrong
    assert state.snapshot().not_finite() == name


def test_restores_counters_and_progress() -> None:
    """A snapshot is restored into another state, which keeps its own tensors."""
    state, other = tiny_state(), tiny_state()
    advance(state, 3)
    count(state, 1.5, 0.0)
    count(state, 0.0, 1.0)
    state.progress.best = Best(12.5, 2, "model")
    kept = other.loss_sum
    other.load_trainer_state_dict(state.snapshot().trainer)
    assert other.progress == state.progress
    assert isinstance(other.progress.best, Best)
    assert other.loss_sum == state.loss_sum
    assert other.loss_sum is kept
    assert other.skips.tolist() == [1, 1]


def test_configured_options_are_kept() -> None:
    """Learning rate, weight decay and initial_lr are not restored; the optimizer's moments are."""
    state = tiny_state(lr=0.1)
    advance(state, 2)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 0.1
    other = tiny_state(lr=0.3, optimizer=OptimizerConfig(weight_decay=0.2))
    configured = [group["weight_decay"] for group in other.optimizer.param_groups]
    other.load_trainer_state_dict(state.snapshot().trainer)
    assert {group["lr"] for group in other.optimizer.param_groups} == {0.3}
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == configured
    assert all("initial_lr" not in group for group in other.optimizer.param_groups)
    restored, saved = (each.optimizer.state_dict()["state"] for each in (other, state))
    torch.testing.assert_close(restored, saved, rtol=0, atol=0)


def test_loss_scale_is_restored_if_saved() -> None:
    """The loss scale of fp16 is restored; resuming an fp32 run with fp16 keeps the initial scale, and vice versa."""
    state, scaled, again = tiny_state(), tiny_state(), tiny_state()
    scaled.scaler, again.scaler = Scaler("cpu", init_scale=8.0), Scaler("cpu", init_scale=64.0)
    scaled.load_trainer_state_dict(state.snapshot().trainer)
    assert scaled.scaler.get_scale() == 8.0
    again.load_trainer_state_dict(scaled.snapshot().trainer)
    assert again.scaler.get_scale() == 8.0
    state.load_trainer_state_dict(scaled.snapshot().trainer)
    assert state.scaler.get_scale() == 1.0
