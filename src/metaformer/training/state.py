"""The state of training: everything that a step changes and resuming needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metaformer.interfaces import Row
from metaformer.training.ema import WeightAverage
from metaformer.training.precision import Scaler


@dataclass
class Best:
    """The best validation result so far."""

    top1: float | None = None  # percent; None before the first validation
    epoch: int | None = None  # counted from 1
    weights: str | None = None  # "model" or "ema"


@dataclass
class Progress:
    """Position in training, and measurements so far. An epoch is complete when it has been validated."""

    epochs_completed: int = 0
    steps_in_epoch: int = 0  # optimizer steps of the epoch in progress
    step: int = 0  # optimizer steps in total, including skipped ones
    samples: int = 0  # images in total
    steps_since_log: int = 0
    skipped_steps: int = 0  # total as of the last log row; the gradients of these steps were not finite
    epoch_loss_sum: float = 0.0  # sum over the logged steps of the epoch in progress
    epoch_loss_count: int = 0  # number of these steps that were not skipped
    best: Best = field(default_factory=Best)
    last_validation: dict[str, Any] = field(default_factory=dict)  # the last validation row

    @property
    def validated(self) -> bool:
        """Whether the current weights have been validated."""
        return self.last_validation.get("step") == self.step

    def row(self, kind: str) -> Row:
        """Return the beginning of a row of metrics: its kind and the position in training."""
        return {"kind": kind, "epoch": self.epochs_completed + 1, "step": self.step, "samples": self.samples}

    def count_step(self, images: int) -> None:
        """Count an optimizer step on `images` images over all ranks."""
        self.step += 1
        self.steps_in_epoch += 1
        self.steps_since_log += 1
        self.samples += images

    def complete_epoch(self, validation: Row) -> bool:
        """Count the epoch as complete with this validation, and return whether it is the best so far."""
        scores = {name: validation[key] for name, key in (("model", "top1"), ("ema", "ema_top1")) if key in validation}
        weights = max(scores, key=lambda name: scores[name])
        is_best = self.best.top1 is None or scores[weights] > self.best.top1
        if is_best:
            self.best = Best(scores[weights], validation["epoch"], weights)
        self.last_validation = validation
        self.epochs_completed += 1
        self.steps_in_epoch = 0
        self.epoch_loss_sum, self.epoch_loss_count = 0.0, 0
        return is_best


@dataclass(frozen=True)
class Snapshot:
    """A copy of a `TrainState` in host memory, which can be written while training continues.

    Attributes:
        weights, ema: state dicts.
        trainer: everything else, in types that torch.load(weights_only=True) accepts.
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
        """Return the name of a tensor of the weights or their average that has a NaN or infinity, or None."""
        for kind, tensors in (("", self.weights), ("ema ", self.ema or {})):
            for name, tensor in tensors.items():
                # A sum is finite only if all its terms are (weights are too small for it to overflow): one quick pass.
                if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():
                    return kind + name
        return None


@dataclass
class TrainState:
    """Everything that a checkpoint contains.

    Attributes:
        loss_sum: float64 scalar on the device: the sum of the losses since the last log row, without those of skipped
            steps; a save replaces it by the mean over the ranks.
        skips: float64 [2] on the device: `skipped_since_log` and `skipped_in_a_row`.
        identity: what must not change during a run (data fingerprint, seed, batch size, ...).
    """

    model: nn.Module
    ema: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scaler: Scaler
    identity: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    loss_sum: Tensor = field(init=False)
    skips: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.skips = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def skipped_since_log(self) -> Tensor:
        """Steps skipped since the last log row: a scalar on the device, a view."""
        return self.skips[0]

    @property
    def skipped_in_a_row(self) -> Tensor:
        """Consecutive steps skipped up to now: a scalar on the device, a view."""
        return self.skips[1]

    def count(self, loss: Tensor, skipped: Tensor) -> None:
        """Add a step's loss, or count the step as skipped, on the device."""
        self.loss_sum += torch.where(skipped > 0, 0.0, loss)
        self.skips += skipped
        self.skipped_in_a_row.mul_(skipped)

    def add_to_epoch(self, loss_sum: float, skipped: int) -> int:
        """Move the steps since the last log row, whose sums have been read, to the sums of the epoch.

        Returns:
            The number of these steps that were not skipped.
        """
        progress = self.progress
        taken = progress.steps_since_log - skipped
        progress.skipped_steps += skipped
        progress.epoch_loss_sum += loss_sum
        progress.epoch_loss_count += taken
        progress.steps_since_log = 0
        self.loss_sum.zero_()
        self.skipped_since_log.zero_()
        return taken

    def trainer_state_dict(self) -> dict[str, Any]:
        """Return everything except the weights, in types that torch.load(weights_only=True) accepts."""
        self.scaler.finish_step()
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "skips": self.skips,
            "identity": self.identity,
            "progress": asdict(self.progress),
        }

    def size(self) -> int:
        """Return the approximate size of a checkpoint in bytes; before the first step, assume AdamW's two moments."""
        weights: int = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        average: int = 0 if self.ema is None else sum(tensor.nbytes for tensor in self.ema.module.state_dict().values())
        states = [value for each in self.optimizer.state.values() for value in each.values()]
        moments: int = sum(value.nbytes for value in states if isinstance(value, Tensor))
        parameters: int = sum(p.nbytes for group in self.optimizer.param_groups for p in group["params"])
        return weights + average + (moments if states else 2 * parameters)

    def snapshot(self) -> Snapshot:
        """Return a copy of everything in host memory."""
        return Snapshot(
            weights=_to_host(self.model.state_dict()),
            ema=None if self.ema is None else _to_host(self.ema.module.state_dict()),
            trainer=_to_host(self.trainer_state_dict()),
        )

    def load_trainer_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `trainer_state_dict` returned; the optimizer's options stay those given to this run."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.pop("initial_lr", None)  # the schedule would use the saved peak otherwise
            group.update(given)
        if state["scaler"]:  # empty if the run needed no scaling so far
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
