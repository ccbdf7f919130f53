"""The training loop: epochs of optimizer steps, validation, checkpoints. It receives built objects, never a config."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaformer.errors import UserError
from metaformer.runtime import Runtime
from metaformer.training.bottleneck import Bottleneck
from metaformer.training.checkpoint import CheckpointConfig, CheckpointFolder
from metaformer.training.precision import Precision
from metaformer.training.schedule import Schedule
from metaformer.training.state import Best, TrainState


class Diverged(UserError):
    """Training cannot go on: the loss is no longer a number."""

    exit_code = 3


class SoftBatch(Protocol):
    """One rank's batch, on the device."""

    @property
    def images(self) -> Tensor:
        """float32 [B, 3, S, S], normalised and augmented."""

    @property
    def targets(self) -> Tensor:
        """float32 [B, classes]."""

    @property
    def waited(self) -> float:
        """Seconds that the loop waited for it."""


class TrainingData(Protocol):
    """Where the batches come from."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[SoftBatch]:
        """This rank's batches from position `first` to the epoch's end; epochs count from 0."""


class Tracker(Protocol):
    """Where rows of metrics and checkpoints go."""

    def metrics(self, row: dict[str, Any]) -> None:
        """One row; its `kind` is "train", "validation" or "final"."""

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        """A checkpoint worth keeping elsewhere too."""

    def message(self, text: str) -> None:
        """A line for people."""


Validate = Callable[[nn.Module], dict[str, Any]]  # a model in; top1, top5, loss, images and quarantined out


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often."""

    epochs: int  # in all, cool-down included
    steps_per_epoch: int
    accumulation_steps: int
    global_batch_size: int
    seed: int
    log_every_steps: int
    checkpoint: CheckpointConfig
    clip_grad_norm: float | None = None
    max_steps: int | None = None  # stop early after this many steps in all


@dataclass
class Window:
    """What this process measures between two log rows of an epoch."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited: float = 0.0  # seconds
    started_loader: float = 0.0  # seconds of them for the epoch's first batch, which workers start with


@dataclass
class Trainer:
    """Runs training from wherever the state stands to the end.

    Attributes:
        network: the state's model as it is called: compiled, distributed.
        inspect: gets the first batch after the start, to make a picture of it.
    """

    state: TrainState
    network: nn.Module
    data: TrainingData
    schedule: Schedule
    precision: Precision
    validate: Validate
    checkpoints: CheckpointFolder
    tracker: Tracker
    runtime: Runtime
    settings: LoopSettings
    inspect: Callable[[SoftBatch], None]
    bottleneck: Bottleneck
    _window: Window = field(init=False)

    def run(self) -> dict[str, Any]:
        """Train, and return the row of the last validation.

        Raises:
            Diverged: the loss is not finite.
            UserError: a data file or the run folder fails.
        """
        progress, settings = self.state.progress, self.settings
        started_at = progress.step
        while progress.epochs_completed < settings.epochs and not self._stopped():
            self._train_epoch()
            if progress.steps_in_epoch == settings.steps_per_epoch:
                self._complete_epoch()
        if progress.last_validation.get("step") != progress.step:  # stopped in the middle of an epoch
            progress.last_validation = self._validation_row("final")
            self._save(f"step-{progress.step:08d}", is_best=False)
        if progress.step > started_at:  # not for a run that was complete before
            self.tracker.metrics(progress.last_validation | {"kind": "final"})
            for folder, aliases in self.checkpoints.pointed().items():
                self.tracker.checkpoint(folder, aliases)
        return progress.last_validation

    def _stopped(self) -> bool:
        limit = self.settings.max_steps
        return limit is not None and self.state.progress.step >= limit

    def _train_epoch(self) -> None:
        progress, settings = self.state.progress, self.settings
        self.network.train()
        first = progress.steps_in_epoch * settings.accumulation_steps
        batches = self._timed(self.data.epoch(progress.epochs_completed, first))
        self._window = Window()
        while progress.steps_in_epoch < settings.steps_per_epoch and not self._stopped():
            lr = self.schedule.set(progress.step)
            last = progress.steps_in_epoch + 1 == settings.steps_per_epoch or progress.step + 1 == settings.max_steps
            logs = last or (progress.step + 1) % settings.log_every_steps == 0
            grad_norm = self._step(batches, logs)
            progress.step += 1
            progress.steps_in_epoch += 1
            progress.steps_since_log += 1
            progress.samples += settings.global_batch_size
            self._window.steps += 1
            if grad_norm is not None:
                self._log(lr, grad_norm)
            every = settings.checkpoint.every_steps
            if every and progress.step % every == 0 and not last:
                self._save(f"step-{progress.step:08d}", is_best=False)

    def _step(self, batches: Iterator[SoftBatch], logs: bool) -> Tensor | None:
        """One optimizer step; for a log row, returns the gradient's norm before clipping, still on the device."""
        state, settings, scaler = self.state, self.settings, self.state.scaler
        for part in range(settings.accumulation_steps):
            batch = next(batches)
            if state.progress.step == 0 and part == 0:
                self.inspect(batch)
            self._seed(part)
            if part < settings.accumulation_steps - 1:
                with self.runtime.without_reduction(self.network):
                    self._forward_backward(batch)
            else:
                self._forward_backward(batch)

        norm = None
        if logs or settings.clip_grad_norm is not None:
            scaler.unscale_(state.optimizer)
            parameters = [p for p in state.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_grad_norm, norm)
        scaler.step(state.optimizer)
        scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model, step=state.progress.step + 1)
        return norm if logs else None

    def _timed(self, batches: Iterator[SoftBatch]) -> Iterator[SoftBatch]:
        for number, batch in enumerate(batches):
            self._window.waited += batch.waited
            self._window.started_loader += 0.0 if number else batch.waited
            yield batch

    def _forward_backward(self, batch: SoftBatch) -> None:
        with self.precision.autocast():
            logits = self.network(batch.images)
        loss = functional.cross_entropy(logits.float(), batch.targets) / self.settings.accumulation_steps
        self.state.scaler.scale(loss).backward()
        self.state.loss_sum += loss.detach()

    def _seed(self, part: int) -> None:
        """Drop path draws from torch's generator: seeded anew for each batch, there is no generator state to save.

        After the batch is read, because torch's DataLoader draws from the same generator when it starts an epoch.
        """
        settings, runtime = self.settings, self.runtime
        position = self.state.progress.step * settings.accumulation_steps + part
        torch.manual_seed((settings.seed * 2**40 + position * runtime.world_size + runtime.rank) % 2**63)

    def _log(self, lr: float, grad_norm: Tensor) -> None:
        """Log the mean over the steps since the last row. Only here and in saving does the host wait for the device."""
        progress, settings, ranks = self.state.progress, self.settings, self.runtime.world_size
        own = self.state.loss_sum.new_tensor([self._window.waited, self._window.started_loader])
        totals = torch.cat([self.state.loss_sum[None], own])
        loss_sum, waited, started_loader = (self.runtime.sum(totals) / ranks).tolist()
        elapsed = time.perf_counter() - self._window.started
        self.bottleneck.add(waited - started_loader, elapsed - started_loader)
        row = self._row("train") | {
            "loss": loss_sum / progress.steps_since_log,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "images_per_second": self._window.steps * settings.global_batch_size / elapsed,
            "data_wait": waited / elapsed,
            "memory_gib": self.runtime.peak_memory_gib(),
        }
        progress.epoch_loss_sum += loss_sum
        self.state.loss_sum.zero_()
        progress.steps_since_log = 0
        self._window = Window()
        self.tracker.metrics(row)
        self._check_finite(loss_sum)

    def _check_finite(self, loss: float) -> None:
        """Called before anything is saved; all ranks have the same loss, so all stop."""
        if not math.isfinite(loss):
            row = self._row("train")
            raise Diverged(
                f"epoch {row['epoch']}, step {row['step']}: the loss is {loss}; "
                "lower optimizer.lr, set clip_grad_norm, or use precision=bf16 or fp32"
            )

    def _complete_epoch(self) -> None:
        progress = self.state.progress
        row = self._validation_row("validation") | {
            "train_loss": progress.epoch_loss_sum / self.settings.steps_per_epoch
        }
        scores = {name: row[key] for name, key in (("model", "top1"), ("ema", "ema_top1")) if key in row}
        weights = max(scores, key=lambda name: scores[name])
        is_best = progress.best.top1 is None or scores[weights] > progress.best.top1
        if is_best:
            progress.best = Best(scores[weights], row["epoch"], weights)
        progress.last_validation = row
        progress.epochs_completed += 1
        progress.steps_in_epoch = 0
        progress.epoch_loss_sum = 0.0
        self.tracker.message(self.bottleneck.verdict(row["epoch"]))
        self.tracker.metrics(row)
        ends = progress.epochs_completed == self.settings.epochs or self._stopped()
        if is_best or ends or progress.epochs_completed % self.settings.checkpoint.every_epochs == 0:
            self._save(f"epoch-{progress.epochs_completed:03d}", is_best)

    def _validation_row(self, kind: str) -> dict[str, Any]:
        state = self.state
        self.runtime.share_buffers(state.model)
        row = self._row(kind) | self.validate(state.model)
        if state.ema is not None:
            self.runtime.share_buffers(state.ema.module)
            ema = self.validate(state.ema.module).items()
            row |= {f"ema_{name}": value for name, value in ema if name not in ("images", "quarantined")}
        return row

    def _row(self, kind: str) -> dict[str, Any]:
        progress = self.state.progress
        epoch = progress.epochs_completed + 1
        return {"kind": kind, "epoch": epoch, "step": progress.step, "samples": progress.samples}

    def _save(self, name: str, is_best: bool) -> None:
        state = self.state
        # All ranks' mean, so that a checkpoint can go on with another number of them.
        state.loss_sum.copy_(self.runtime.sum(state.loss_sum) / self.runtime.world_size)
        self._check_finite(float(state.loss_sum))
        self.runtime.main_only(lambda: self.checkpoints.save(state, name, is_best), None)
