"""The learning rate schedule: timm's cosine with warm-up, a function of the step, without state to save."""

from dataclasses import dataclass
from enum import Enum

import torch
from timm.scheduler import CosineLRScheduler

from metaformer.errors import check_at_least


class ScheduleUnit(Enum):
    """How often the learning rate changes."""

    epoch = "epoch"  # as in the authors' code
    step = "step"


@dataclass
class ScheduleConfig:
    """The defaults are the paper's: 5 warm-up epochs within the cosine, then 10 more epochs at the final rate."""

    unit: ScheduleUnit = ScheduleUnit.epoch
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 10

    def __post_init__(self) -> None:
        check_at_least(0, self, "warmup_epochs", "cooldown_epochs", prefix="schedule.")


class Schedule:
    """Sets the optimizer's learning rate for each step."""

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
        """Set and return the learning rate of a step, counted from 0."""
        if self._per_epoch:
            self._cosine.step(step // self._steps_per_epoch)
        else:
            self._cosine.step_update(step)
        return float(self._optimizer.param_groups[0]["lr"])
