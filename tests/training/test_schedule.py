"""Test the learning rate of every epoch and step against the paper's formula."""

import math

import pytest
import torch
from torch import nn

from metaformer.errors import UserError
from metaformer.training.config import ScheduleConfig, ScheduleUnit
from metaformer.training.schedule import Schedule

PEAK, WARMUP_LR, MIN_LR = 4e-3, 1e-6, 1e-5
EPOCHS, WARMUP, COOLDOWN, STEPS = 300, 5, 10, 7


def paper(epoch: float) -> float:
    """Return the learning rate of the authors' code."""
    if epoch < WARMUP:
        return WARMUP_LR + epoch * (PEAK - WARMUP_LR) / WARMUP
    if epoch < EPOCHS:
        return MIN_LR + 0.5 * (PEAK - MIN_LR) * (1 + math.cos(math.pi * epoch / EPOCHS))
    return MIN_LR


def schedule(unit: ScheduleUnit) -> tuple[Schedule, torch.optim.Optimizer]:
    """Return the default schedule and its optimizer with two parameter groups."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=PEAK)
    return Schedule(ScheduleConfig(unit=unit), optimizer, EPOCHS, STEPS), optimizer


def test_every_epoch_has_the_papers_rate() -> None:
    """At the first and last step of all 310 epochs, the returned rate and that of every group follow the formula."""
    rates, optimizer = schedule(ScheduleUnit.epoch)
    for epoch in range(EPOCHS + COOLDOWN):
        for step in (epoch * STEPS, epoch * STEPS + STEPS - 1):
            assert rates.set(step) == pytest.approx(paper(epoch), rel=1e-12)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([paper(epoch)] * 2, rel=1e-12)


def test_every_step_follows_the_same_curve() -> None:
    """Per step, the rate follows the formula at fractions of epochs; at an epoch's start both units agree."""
    per_step, _ = schedule(ScheduleUnit.step)
    per_epoch, _ = schedule(ScheduleUnit.epoch)
    for step in range((EPOCHS + COOLDOWN) * STEPS):
        assert per_step.set(step) == pytest.approx(paper(step / STEPS), rel=1e-9)
        if step % STEPS == 0:
            assert per_step.set(step) == pytest.approx(per_epoch.set(step), rel=1e-12)


def test_warm_up_and_cool_down() -> None:
    """Epoch 0 has 1e-6; epoch 5, the first on the cosine, is already below the peak; epochs 300 to 309 have 1e-5."""
    rates, _ = schedule(ScheduleUnit.epoch)
    assert rates.set(0) == WARMUP_LR
    assert rates.set(4 * STEPS) == pytest.approx(3.2002e-3, rel=1e-6)
    assert 0.999 * PEAK < rates.set(5 * STEPS) < PEAK
    assert {rates.set(epoch * STEPS) for epoch in range(EPOCHS, EPOCHS + COOLDOWN)} == {MIN_LR}


def test_warm_up_in_steps() -> None:
    """warmup_steps replaces the epochs of warm-up, and needs a rate that changes with each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    rates = Schedule(ScheduleConfig(unit=ScheduleUnit.step, warmup_steps=10), optimizer, EPOCHS, STEPS)
    assert rates.set(0) == WARMUP_LR
    assert rates.set(5) == pytest.approx((WARMUP_LR + PEAK) / 2)
    cosine = math.cos(math.pi * 10 / (EPOCHS * STEPS))
    assert rates.set(10) == pytest.approx(MIN_LR + 0.5 * (PEAK - MIN_LR) * (1 + cosine))
    with pytest.raises(UserError, match=r"^schedule\.warmup_steps=10: needs schedule=cosine_per_step$"):
        ScheduleConfig(warmup_steps=10)


def test_depends_on_the_step_alone() -> None:
    """The rate depends only on the step, so resuming needs no state."""
    rates, _ = schedule(ScheduleUnit.step)
    forward = [rates.set(step) for step in range(50)]
    assert [rates.set(step) for step in reversed(range(50))] == forward[::-1]
