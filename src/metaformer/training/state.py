"""Everything that training changes and resume needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


@dataclass
class Best:
    """The best validation so far."""

    top1: float | None = None  # percent; None before the first validation
    epoch: int | None = None  # counted from 1
    weights: str | None = None  # "model" or "ema"


@dataclass
class Progress:
    """Where training stands. An epoch counts as completed once it is validated."""

    epochs_completed: int = 0
    steps_in_epoch: int = 0  # optimizer steps of the epoch in progress
    step: int = 0  # optimizer steps in all
    samples: int = 0  # images in all
    steps_since_log: int = 0
    epoch_loss_sum: float = 0.0  # over the logged steps of the epoch in progress
    best: Best = field(default_factory=Best)
    last_validation: dict[str, Any] = field(default_factory=dict)  # the row that was logged


@dataclass
class TrainState:
    """All that a checkpoint holds.

    Attributes:
        loss_sum: float64 scalar on the device: losses since the last log row; a save makes it all ranks' mean.
        identity: what a run cannot change half-way (data fingerprint, seed, batch, ...).
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_sum: Tensor
    identity: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, of types that torch.load(weights_only=True) accepts."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum.cpu(),
            "identity": self.identity,
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; the optimizer's options stay those that this run was given."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.pop("initial_lr", None)  # else the schedule would take the saved peak
            group.update(given)
        if state["scaler"]:  # empty where the run so far needed no scaling
            self.scaler.load_state_dict(state["scaler"])
        self.loss_sum.copy_(state["loss_sum"])
        progress = dict(state["progress"])
        self.progress = Progress(**(progress | {"best": Best(**progress["best"])}))
