"""The training state: what is counted, copied and restored."""

import copy
import math

import pytest
import torch

from metaformer.training.optimizer import OptimizerConfig
from metaformer.training.precision import Scaler
from metaformer.training.state import Best, TrainState
from tests.training.conftest import advance, tiny_state


def count(state: TrainState, loss: float, skipped: float) -> None:
    state.count(torch.tensor(loss, dtype=torch.float64), torch.tensor(skipped))


def test_counts_losses_and_steps_left_out() -> None:
    """Losses of the steps that were taken add up, NaN ones do not; a step that is taken ends a row of skips."""
    state = tiny_state()
    expected = [(1.5, [0, 0]), (1.5, [1, 1]), (1.5, [2, 2]), (3.75, [2, 0]), (3.75, [3, 1])]
    steps = [(1.5, 0.0), (math.nan, 1.0), (math.inf, 1.0), (2.25, 0.0), (4.0, 1.0)]
    for (loss, skipped), (loss_sum, skips) in zip(steps, expected, strict=True):
        count(state, loss, skipped)
        assert float(state.loss_sum) == loss_sum
        assert state.skips.tolist() == skips
    assert state.loss_sum.dtype == torch.float64


def test_snapshot_is_a_copy() -> None:
    """What training does afterwards changes nothing in it: weights, average, moments, counters, progress."""
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
    """No EMA, no copy of one."""
    assert tiny_state(ema=False).snapshot().ema is None


@pytest.mark.parametrize(
    ("where", "name"),
    [("2.weight", "2.weight"), ("1.running_var", "1.running_var"), ("ema 0.bias", "ema 0.bias"), (None, None)],
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_finds_what_is_not_finite(where: str | None, name: str | None, wrong: float) -> None:
    """One number of a weight, of a buffer or of the average is found, under the tensor's name."""
    state = tiny_state()
    assert state.ema is not None
    if where is not None:
        model = state.ema.module if where.startswith("ema ") else state.model
        model.state_dict()[where.removeprefix("ema ")].view(-1)[-1] = wrong
    assert state.snapshot().not_finite() == name


def test_restores_counters_and_progress() -> None:
    """A state that was saved comes back in another, which goes on with its own tensors."""
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


def test_options_stay_those_that_were_given() -> None:
    """Learning rate, decay and what the schedule keeps of its peak are this run's, the moments the saved one's."""
    state = tiny_state(lr=0.1)
    advance(state, 2)
    for group in state.optimizer.param_groups:
        group["initial_lr"] = 0.1
    other = tiny_state(lr=0.3, optimizer=OptimizerConfig(weight_decay=0.2))
    given = [group["weight_decay"] for group in other.optimizer.param_groups]
    other.load_trainer_state_dict(state.snapshot().trainer)
    assert {group["lr"] for group in other.optimizer.param_groups} == {0.3}
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == given
    assert all("initial_lr" not in group for group in other.optimizer.param_groups)
    own, saved = (one.optimizer.state_dict()["state"] for one in (other, state))
    torch.testing.assert_close(own, saved, rtol=0, atol=0)


def test_a_factor_goes_on_where_there_is_one() -> None:
    """From fp32 to fp16 and back: the factor of fp16 is restored, and where none was saved the fresh one stays."""
    state, scaled, again = tiny_state(), tiny_state(), tiny_state()
    scaled.scaler, again.scaler = Scaler("cpu", init_scale=8.0), Scaler("cpu", init_scale=64.0)
    scaled.load_trainer_state_dict(state.snapshot().trainer)
    assert scaled.scaler.get_scale() == 8.0
    again.load_trainer_state_dict(scaled.snapshot().trainer)
    assert again.scaler.get_scale() == 8.0
    state.load_trainer_state_dict(scaled.snapshot().trainer)
    assert state.scaler.get_scale() == 1.0
