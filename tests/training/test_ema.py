"""Test the moving average of the weights."""

import pytest
import torch

from metaformer.training.config import EmaConfig
from metaformer.training.ema import make_ema
from tests.training.conftest import advance, tensors, tiny_network, tiny_state

DECAY = 0.9


def test_disabled_by_default() -> None:
    """The default is no average, as in the paper."""
    assert make_ema(EmaConfig(), tiny_network()) is None


def test_follows_the_formula() -> None:
    """The first step copies the weights; each later one gives decay * average + (1 - decay) * weights."""
    state = tiny_state()
    assert state.ema is not None
    advance(state, 1)
    expected = tensors(state.model)
    torch.testing.assert_close(dict(state.ema.module.named_parameters()), dict(state.model.named_parameters()))
    for _ in range(5):
        advance(state, 1)
        for name, parameter in state.model.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * parameter.detach()
    for name, average in state.ema.module.named_parameters():
        torch.testing.assert_close(average.detach(), expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(average, state.model.get_parameter(name)), "the average must lag behind"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_skipped_step_changes_nothing(steps: int) -> None:
    """A step that was not taken leaves the average as it is, whatever the weights are."""
    state = tiny_state()
    assert state.ema is not None
    advance(state, steps + 1)
    before = tensors(state.ema.module)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    state.ema.update_where(torch.zeros(()), state.model, step=steps + 2)
    torch.testing.assert_close(tensors(state.ema.module), before, rtol=0, atol=0)


def test_batchnorm_statistics() -> None:
    """Running means are averaged like weights; the integer count of batches is copied from the model."""
    state = tiny_state()
    assert state.ema is not None
    advance(state, 1)
    mean = state.model.get_buffer("1.running_mean").clone()
    for _ in range(3):
        advance(state, 1)
        mean = DECAY * mean + (1 - DECAY) * state.model.get_buffer("1.running_mean")
    torch.testing.assert_close(state.ema.module.get_buffer("1.running_mean"), mean, rtol=1e-5, atol=1e-7)
    assert state.ema.module.get_buffer("1.num_batches_tracked") == 4


def test_leaves_the_model_alone() -> None:
    """An average does not change the trained weights, and needs no memory for gradients."""
    with_average, without = tiny_state(), tiny_state(ema=False)
    for state in (with_average, without):
        advance(state, 3)
    torch.testing.assert_close(with_average.model.state_dict(), without.model.state_dict(), rtol=0, atol=0)
    assert with_average.ema is not None
    assert not with_average.ema.module.training
    assert all(parameter.grad is None for parameter in with_average.ema.module.parameters())


@pytest.mark.parametrize("step", [2, 10, 1000])
def test_warm_up_starts_with_a_short_memory(step: int) -> None:
    """With warmup, the decay rises at each step towards its value; without, it is constant from the second step."""
    rising = make_ema(EmaConfig(enabled=True, decay=0.9999, warmup=True), tiny_network())
    constant = make_ema(EmaConfig(enabled=True, decay=0.9999), tiny_network())
    assert rising is not None
    assert constant is not None
    assert rising.get_decay(step - 1) < rising.get_decay(step) < constant.get_decay(step) == 0.9999
