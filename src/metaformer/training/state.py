"""Everything that training changes and resume needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaformer.training.ema import WeightAverage
from metaformer.training.precision import Scaler


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
    step: int = 0  # optimizer steps in all, those left out included
    samples: int = 0  # images in all
    steps_since_log: int = 0
    skipped_steps: int = 0  # in all, as of the last log row: their gradients were not finite
    epoch_loss_sum: float = 0.0  # over the logged steps of the epoch in progress
    epoch_loss_count: int = 0  # of these steps, those that were taken
    best: Best = field(default_factory=Best)
    last_validation: dict[str, Any] = field(default_factory=dict)  # the row that was logged

    @property
    def validated(self) -> bool:
        """Whether the weights as they are have been validated."""
        return self.last_validation.get("step") == self.step


@dataclass(frozen=True)
class Snapshot:
    """A copy of a `TrainState` in host memory: training may go on while it is written.

    Attributes:
        weights, ema: state dicts.
        trainer: everything else, of types that torch.load(weights_only=True) accepts.
    """

    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    trainer: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """`TrainState.identity`."""
        identity: dict[str, Any] = self.trainer["identity"]
        return identity

    @property
    def progress(self) -> dict[str, Any]:
        """`Progress` as a dict."""
        progress: dict[str, Any] = self.trainer["progress"]
        return progress

    def not_finite(self) -> str | None:
        """The name of a tensor of the weights, or of their average, that holds a NaN or an infinity, or None."""
        for kind, tensors in (("", self.weights), ("ema ", self.ema or {})):
            for name, tensor in tensors.items():
                # A sum is finite only if all its terms are (or it overflows, which weights do not): one quick pass.
                if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():
                    return kind + name
        return None


@dataclass
class TrainState:
    """All that a checkpoint holds.

    Attributes:
        loss_sum: float64 scalar on the device: losses since the last log row of the steps that were taken; a save makes
            it all ranks' mean.
        skips: float64 [2] on the device: steps left out since the last log row, and in a row up to now.
        identity: what a run cannot change half-way (data fingerprint, seed, batch, ...).
    """

    model: nn.Module
    ema: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scaler: Scaler
    loss_sum: Tensor
    skips: Tensor
    identity: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    def count(self, loss: Tensor, skipped: Tensor) -> None:
        """Add a step's loss, or count the step as left out; nothing leaves the device."""
        self.loss_sum += torch.where(skipped > 0, 0.0, loss)
        self.skips += skipped
        self.skips[1] *= skipped

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, of types that torch.load(weights_only=True) accepts."""
        self.scaler.settle()
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "skips": self.skips,
            "identity": self.identity,
            "progress": asdict(self.progress),
        }

    def size(self) -> int:
        """About the bytes of a checkpoint; before the first step, with two moments for each parameter, as of AdamW."""
        weights: int = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        average: int = 0 if self.ema is None else sum(tensor.nbytes for tensor in self.ema.module.state_dict().values())
        states = [value for each in self.optimizer.state.values() for value in each.values()]
        moments: int = sum(value.nbytes for value in states if isinstance(value, Tensor))
        parameters: int = sum(p.nbytes for group in self.optimizer.param_groups for p in group["params"])
        return weights + average + (moments if states else 2 * parameters)

    def snapshot(self) -> Snapshot:
        """A copy of everything in host memory."""
        return Snapshot(
            weights=_to_host(self.model.state_dict()),
            ema=None if self.ema is None else _to_host(self.ema.module.state_dict()),
            trainer=_to_host(self.state_dict()),
        )

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
        self.skips.copy_(state["skips"])
        progress = dict(state["progress"])
        self.progress = Progress(**(progress | {"best": Best(**progress["best"])}))


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return value
