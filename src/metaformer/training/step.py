"""An optimizer step: forward and backward passes over the parts of the batch, clipping, and the update."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from metaformer.interfaces import Batch
from metaformer.runtime import Runtime
from metaformer.training.losses import Loss
from metaformer.training.precision import Precision
from metaformer.training.state import TrainState
from metaformer.training.stragglers import Stopwatch
from metaformer.training.undo import RunningStatistics


@dataclass
class Learner:
    """Everything an optimizer step needs besides its batches.

    Attributes:
        network: the state's model in the form to call: compiled or wrapped by DDP.
        loss: the loss of a batch's logits.
        seed: seed of drop path.
        accumulation_steps: number of batches in a step.
        clip_grad_norm: maximum norm of the gradients; None disables clipping.
        frozen_norms: BatchNorms that keep their running statistics.
        stopwatch: measures the forward passes, the work of this rank that does not wait for other ranks.
    """

    state: TrainState
    network: nn.Module
    precision: Precision
    runtime: Runtime
    loss: Loss
    seed: int = 0
    accumulation_steps: int = 1
    clip_grad_norm: float | None = None
    frozen_norms: Sequence[nn.Module] = ()
    stopwatch: Stopwatch = field(init=False)
    running_statistics: RunningStatistics = field(init=False)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.runtime.device)
        self.running_statistics = RunningStatistics(self.state.model)

    def train_mode(self) -> None:
        """Set the network to training mode, except for frozen BatchNorms."""
        self.network.train()
        for norm in self.frozen_norms:
            norm.eval()


def train_step(learner: Learner, batches: Iterator[Batch], measure_norm: bool = False) -> Tensor | None:
    """Take an optimizer step on the next batches. It has no effect on any state if the gradients are not finite.

    The host does not wait for the device, unless `batches` does.

    Returns:
        The norm of the gradients before clipping, a scalar on the device, or None unless `measure_norm` is set.
    """
    state, scaler = learner.state, learner.state.scaler
    loss = torch.zeros_like(state.loss_sum)
    learner.running_statistics.keep()
    for part in range(learner.accumulation_steps):
        batch = next(batches)
        _seed_drop_path(learner, part)
        is_last = part == learner.accumulation_steps - 1
        with nullcontext() if is_last else learner.runtime.without_reduction(learner.network):
            loss += _forward_backward(learner, batch)

    norm = None
    if measure_norm or learner.clip_grad_norm is not None:
        scaler.unscale_(state.optimizer)
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if learner.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, learner.clip_grad_norm, norm)
    scaler.step(state.optimizer)
    skipped = scaler.skipped(state.optimizer)
    state.count(loss, skipped)
    learner.running_statistics.restore_where(skipped)
    scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update_where(1 - skipped, state.model, step=state.progress.step + 1)
    return norm if measure_norm else None


def discard_step(learner: Learner) -> None:
    """Undo a step that was interrupted between two of its batches."""
    learner.running_statistics.restore_where(torch.ones((), device=learner.runtime.device))
    learner.state.optimizer.zero_grad(set_to_none=True)


def _forward_backward(learner: Learner, batch: Batch) -> Tensor:
    """Accumulate the batch's gradients; return its share of the step's loss, on the device."""
    learner.stopwatch.start()
    with learner.precision.autocast():
        logits = learner.network(batch.images)
    loss = learner.loss(logits.float(), batch) / learner.accumulation_steps
    learner.stopwatch.stop()
    learner.state.scaler.scale(loss).backward()
    return loss.detach()


def _seed_drop_path(learner: Learner, part: int) -> None:
    """Seed torch's generator for each batch, so that there is no generator state to save.

    This comes after the batch was read: torch's DataLoader draws from the same generator when it starts an epoch.
    """
    runtime = learner.runtime
    position = learner.state.progress.step * learner.accumulation_steps + part
    torch.manual_seed((learner.seed * 2**40 + position * runtime.world_size + runtime.rank) % 2**63)
