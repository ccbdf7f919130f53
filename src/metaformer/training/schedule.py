"""The learning rate over time: timm's cosine with warm-up, set from the step alone, so there is no state to save."""

from dataclasses import dataclass
from enum import Enum

import torch
from timm.scheduler import CosineLRScheduler


class ScheduleUnit(Enum):
    """How often the learning rate changes."""

    epoch = "epoch"  # as the paper's program
    step = "step"


@dataclass
class ScheduleConfig:
    """The paper's: 5 epochs of warm-up inside the cosine, then 10 more epochs at the end's rate."""

    unit: ScheduleUnit = ScheduleUnit.epoch
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 10


class Schedule:
    """Sets the optimizer's learning rate for a step."""

    def __init__(
        self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._per_epoch = config.unit is ScheduleUnit.epoch
        scale = 1 if self._per_epoch else steps_per_epoch
        self._optimizer = optimizer
        self._cosine = CosineLRScheduler(
            optimizer,
            t_initial=epochs * scale,
            lr_min=config.min_lr,
            warmup_t=config.warmup_epochs * scale,
            warmup_lr_init=config.warmup_lr,
            t_in_epochs=self._per_epoch,
        )

    def set(self, step: int) -> float:
        """Set and return the learning rate of optimizer step `step`, counted from 0."""
        if self._per_epoch:
            self._cosine.step(step // self._steps_per_epoch)
        else:
            self._cosine.step_update(step)
        return float(self._optimizer.param_groups[0]["lr"])
