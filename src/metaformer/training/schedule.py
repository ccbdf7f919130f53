"""The learning rate schedule: timm's cosine with warm-up, as a function of the step, without state to save."""

import torch
from timm.scheduler import CosineLRScheduler

from metaformer.training.config import ScheduleConfig, ScheduleUnit


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
            warmup_t=config.warmup_epochs * scale if config.warmup_steps is None else config.warmup_steps,
            warmup_lr_init=config.warmup_lr,
            t_in_epochs=self._per_epoch,
        )

    def set(self, step: int) -> float:
        """Set the learning rate of a step, counted from 0, and return it. With layer decay, return that of the head."""
        if self._per_epoch:
            self._cosine.step(step // self._steps_per_epoch)
        else:
            self._cosine.step_update(step)
        return max(float(group["lr"]) for group in self._optimizer.param_groups)
