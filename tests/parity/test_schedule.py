"""Tests that learning rates equal those of timm's training script exactly."""

import argparse
import math

import pytest
import torch
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
from torch import nn

from metaformer.training.config import OptimizerConfig, ScheduleConfig, ScheduleUnit
from metaformer.training.schedule import Schedule

EPOCHS, COOLDOWN = 300, 10
IMAGES = 1_281_167  # of ImageNet's training split
batches = pytest.mark.parametrize("batch", [1024, 4096])


def paper(epoch: float, peak: float) -> float:
    """Return the learning rate by the recipe's formula."""
    if epoch < 5:
        return 1e-6 + epoch * (peak - 1e-6) / 5
    if epoch < EPOCHS:
        return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / EPOCHS))
    return 1e-5


def optimizer(lr: float) -> torch.optim.Optimizer:
    """Make an optimizer with two parameter groups, as weight decay requires."""
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=lr)


def ours(batch: int, unit: ScheduleUnit) -> Schedule:
    """Make the schedule of the default configuration."""
    peak = OptimizerConfig().learning_rate(batch)
    return Schedule(ScheduleConfig(unit=unit), optimizer(peak), EPOCHS, IMAGES // batch)


def timms(batch: int, on_updates: bool) -> list[float]:
    """Return the rate of every epoch, or of every step, of timm's train.py with the paper's arguments.

    timm's script builds the schedule from its arguments and trains for the number of epochs that the schedule returns.
    It sets the rate of the next epoch after each epoch, or of the next step after each step; the first rate is set when
    the schedule is built.
    """
    args = argparse.Namespace(
        sched="cosine", epochs=EPOCHS, warmup_epochs=5, cooldown_epochs=COOLDOWN, min_lr=1e-5, warmup_lr=1e-6,
        seed=42, lr_noise=None, lr_cycle_limit=1, lr_k_decay=1.0, sched_on_updates=on_updates,
    )  # fmt: skip
    steps, sgd = IMAGES // batch, optimizer(1e-3 * batch / 1024)
    scheduler, epochs = create_scheduler_v2(sgd, **scheduler_kwargs(args), updates_per_epoch=steps)
    assert epochs == EPOCHS + COOLDOWN
    rates = []
    for epoch in range(epochs):
        for step in range(epoch * steps, (epoch + 1) * steps if on_updates else epoch * steps + 1):
            assert sgd.param_groups[0]["lr"] == sgd.param_groups[1]["lr"]
            rates.append(sgd.param_groups[0]["lr"])
            scheduler.step_update(step + 1)
        scheduler.step(epoch + 1)
    return rates


@batches
def test_every_epoch_has_timms_rate(batch: int) -> None:
    """All 310 epochs at batch 1024 and 4096 have timm's rate in their first, middle and last step."""
    schedule, steps = ours(batch, ScheduleUnit.epoch), IMAGES // batch
    expected = timms(batch, on_updates=False)
    assert len(expected) == 310
    for offset in (0, steps // 2, steps - 1):
        assert [schedule.set(epoch * steps + offset) for epoch in range(310)] == expected


@batches
def test_every_step_has_timms_rate(batch: int) -> None:
    """In the per-step variant, every step of the 310 epochs has the rate of timm's `--sched-on-updates`."""
    schedule, expected = ours(batch, ScheduleUnit.step), timms(batch, on_updates=True)
    assert len(expected) == 310 * (IMAGES // batch)
    assert [schedule.set(step) for step in range(len(expected))] == expected


@batches
def test_timm_and_the_program_follow_the_recipe(batch: int) -> None:
    """timm's rates and ours follow the recipe's formula: epoch 0 runs at 1e-6, and the peak is 1e-3 per 1024 images."""
    peak = {1024: 1e-3, 4096: 4e-3}[batch]
    formula = [paper(epoch, peak) for epoch in range(310)]
    schedule, steps = ours(batch, ScheduleUnit.epoch), IMAGES // batch
    rates = [schedule.set(epoch * steps) for epoch in range(310)]
    assert rates == pytest.approx(formula, rel=0, abs=1e-12)
    assert timms(batch, on_updates=False) == pytest.approx(formula, rel=0, abs=1e-12)
    assert {schedule.set(step) for step in range(steps)} == {1e-6}
    assert set(rates[-COOLDOWN:]) == {1e-5}
