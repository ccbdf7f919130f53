"""The training loop: epochs of optimizer steps, validation, checkpoints. It receives built objects, never a config."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaformer.errors import Diverged, Interrupted
from metaformer.goodput import SAVING, TRAINING, VALIDATING, Goodput
from metaformer.interfaces import Batch, BatchSource, Tracker
from metaformer.runtime import Process, Runtime
from metaformer.training.bottleneck import Bottleneck
from metaformer.training.config import LoopSettings
from metaformer.training.interruption import Interruption, StopWaitingError
from metaformer.training.precision import Precision
from metaformer.training.replicas import check_replicas
from metaformer.training.saver import CheckpointSaver
from metaformer.training.schedule import Schedule
from metaformer.training.state import Best, TrainState
from metaformer.training.stragglers import Stopwatch, describe_straggler
from metaformer.training.undo import RunningStatistics
from metaformer.training.watchdog import Watchdog

# Takes a model, and what to ask before each batch whether to stop; returns top1, top5, loss, images and quarantined.
# Raises Interrupted on all ranks if one has stopped.
Validate = Callable[[nn.Module, Callable[[], bool]], dict[str, Any]]
ADVICE = "lower optimizer.lr, set clip_grad_norm, or use precision=bf16 or fp32"


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
        processes: where each rank runs.
        inspect: gets the first batch after the start, to make a picture of it.
    """

    state: TrainState
    network: nn.Module
    data: BatchSource
    schedule: Schedule
    precision: Precision
    validate: Validate
    saver: CheckpointSaver
    tracker: Tracker
    runtime: Runtime
    processes: list[Process]
    watchdog: Watchdog
    goodput: Goodput
    settings: LoopSettings
    inspect: Callable[[Batch], None]
    bottleneck: Bottleneck
    _window: Window = field(init=False)
    _saved_step: int = field(init=False)

    def __post_init__(self) -> None:
        self._interruption = Interruption(self.runtime)
        self._stopwatch = Stopwatch(self.runtime.device)
        self._running_statistics = RunningStatistics(self.state.model)
        self._saved_step = self.state.progress.step

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether this rank has been asked to stop, and training continues still."""
        return self._interruption.pending

    def run(self) -> dict[str, Any]:
        """Train, and return the row of the last validation.

        Raises:
            Interrupted: a signal asked for it; where training stands is saved.
            Diverged: steps or weights are not finite, or ranks differ.
            UserError: a data file or the run folder fails.
        """
        with self._interruption.listening():
            try:
                return self._run()
            finally:
                self.watchdog.training_ends()

    def _run(self) -> dict[str, Any]:
        progress, settings = self.state.progress, self.settings
        self.goodput.enter(TRAINING)
        while progress.epochs_completed < settings.epochs and not self._stopped():
            self._train_epoch()
            if progress.steps_in_epoch == settings.steps_per_epoch:
                self._complete_epoch()
        if not progress.validated:  # stopped in the middle of an epoch
            progress.last_validation = self._validation_row("final")
            self._save(f"step-{progress.step:08d}")
        self._finish_saving()
        self._interruption.settle()
        for folder, aliases in self.saver.folder.aliases().items():
            self.tracker.checkpoint(folder, aliases)
        # Last: a run whose rows end without it is not complete, and does all of this again when it is resumed.
        self.tracker.metrics(progress.last_validation | {"kind": "final"})
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
            try:
                grad_norm = self._step(batches, logs)
            except StopWaitingError:
                self._undo_begun_step()
                self._interrupt()
            progress.step += 1
            progress.steps_in_epoch += 1
            progress.steps_since_log += 1
            progress.samples += settings.global_batch_size
            self._window.steps += 1
            if grad_norm is not None:
                self._log(lr, grad_norm)
            self._guard_step(last)

    def _guard_step(self, last: bool) -> None:
        """What happens at the boundary between two steps: on all ranks at the same one."""
        step, every = self.state.progress.step, self.settings.guards.compare_ranks_every_steps
        self.watchdog.beat()
        if every and step % every == 0 and self.runtime.world_size > 1:
            check_replicas(self.state.model, self.runtime, step)
        every = self.settings.checkpoint.every_steps
        if every and step >= self._saved_step + every and not last and self._gradients_were_finite():
            self._save(f"step-{step:08d}")
        if self._interruption.agreed():
            self._interrupt()

    def _gradients_were_finite(self) -> bool:
        """Of the last step: else the weights may be no good any more, and a save waits for the next step."""
        return not self.state.skips[1]

    def _undo_begun_step(self) -> None:
        """Forget a step whose batches did not all come."""
        self._running_statistics.restore_where(torch.ones((), device=self.runtime.device))
        self.state.optimizer.zero_grad(set_to_none=True)

    def _interrupt(self) -> NoReturn:
        """Save where training stands, and end it."""
        step = self.state.progress.step
        if self._saved_step != step:
            self._save(f"step-{step:08d}")
        self._finish_saving()
        raise Interrupted(f"{self._interruption.reason}: step {step} is saved; the same command goes on from there")

    def _step(self, batches: Iterator[Batch], logs: bool) -> Tensor | None:
        """One optimizer step; for a log row, returns the gradient's norm before clipping, still on the device."""
        state, settings, scaler = self.state, self.settings, self.state.scaler
        loss = torch.zeros_like(state.loss_sum)
        self._running_statistics.keep()
        for part in range(settings.accumulation_steps):
            batch = next(batches)
            if state.progress.step == 0 and part == 0:
                self.inspect(batch)
            self._seed(part)
            if part < settings.accumulation_steps - 1:
                with self.runtime.without_reduction(self.network):
                    loss += self._forward_backward(batch)
            else:
                loss += self._forward_backward(batch)

        norm = None
        if logs or settings.clip_grad_norm is not None:
            scaler.unscale_(state.optimizer)
            parameters = [p for p in state.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_grad_norm, norm)
        scaler.step(state.optimizer)
        skipped = scaler.skipped(state.optimizer)
        state.count(loss, skipped)
        self._running_statistics.restore_where(skipped)
        scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_where(1 - skipped, state.model, step=state.progress.step + 1)
        return norm if logs else None

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for number in itertools.count():
            with self._interruption.waiting():
                batch = next(batches)
            self._window.waited += batch.waited
            self._window.started_loader += 0.0 if number else batch.waited
            yield batch

    def _forward_backward(self, batch: Batch) -> Tensor:
        """The batch's share of the step's loss, on the device."""
        self._stopwatch.start()
        with self.precision.autocast():
            logits = self.network(batch.images)
        loss = functional.cross_entropy(logits.float(), batch.targets) / self.settings.accumulation_steps
        self._stopwatch.stop()
        self.state.scaler.scale(loss).backward()
        return loss.detach()

    def _seed(self, part: int) -> None:
        """Drop path draws from torch's generator: seeded anew for each batch, there is no generator state to save.

        After the batch is read, because torch's DataLoader draws from the same generator when it starts an epoch.
        """
        settings, runtime = self.settings, self.runtime
        position = self.state.progress.step * settings.accumulation_steps + part
        torch.manual_seed((settings.seed * 2**40 + position * runtime.world_size + runtime.rank) % 2**63)

    def _log(self, lr: float, grad_norm: Tensor) -> None:
        """Log the mean over the steps since the last row. Only here and in saving does the host wait for the device."""
        progress, settings, state, window = self.state.progress, self.settings, self.state, self._window
        skipped, in_a_row = state.skips.tolist()
        taken = progress.steps_since_log - int(skipped)
        own = torch.tensor([float(state.loss_sum), window.waited, window.started_loader, self._stopwatch.read()])
        ranks = torch.stack(self.runtime.gather(own.double()))
        loss_sum, waited, started_loader, _ = ranks.mean(dim=0).tolist()
        elapsed = time.perf_counter() - window.started
        self.goodput.record_wait(window.waited)
        self.bottleneck.add(waited - started_loader, elapsed - started_loader)
        progress.skipped_steps += int(skipped)
        row = self._row("train") | {
            "loss": loss_sum / taken if taken else math.nan,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "images_per_second": window.steps * settings.global_batch_size / elapsed,
            "data_wait": waited / elapsed,
            "skipped_steps": progress.skipped_steps,
            "memory_gib": self.runtime.peak_memory_gib(),
        }
        progress.epoch_loss_sum += loss_sum
        progress.epoch_loss_count += taken
        state.loss_sum.zero_()
        state.skips[0] = 0
        progress.steps_since_log = 0
        self._window = Window()
        self.tracker.metrics(row)
        self._name_straggler((ranks[:, 1] - ranks[:, 2] + ranks[:, 3]).tolist(), elapsed - started_loader)
        self._check_finite(loss_sum, int(in_a_row))

    def _name_straggler(self, seconds: list[float], elapsed: float) -> None:
        if self.runtime.world_size > 1:
            line = describe_straggler(seconds, [process.host for process in self.processes], elapsed)
            if line is not None:
                self.tracker.message(line)

    def _check_finite(self, loss: float, skipped_in_a_row: int) -> None:
        """Called before anything is saved; all ranks have the same loss, so all stop."""
        limit = min(self.settings.guards.max_skipped_steps, self.settings.steps_per_epoch)
        row = self._row("train")
        what = f"the loss is {loss}"
        if skipped_in_a_row >= limit:
            what = f"the last {skipped_in_a_row} steps had gradients that are not finite, and were left out"
        elif math.isfinite(loss):
            return
        raise Diverged(f"epoch {row['epoch']}, step {row['step']}: {what}; {ADVICE}")

    def _complete_epoch(self) -> None:
        progress = self.state.progress
        row = self._validation_row("validation") | {
            "train_loss": progress.epoch_loss_sum / max(1, progress.epoch_loss_count)
        }
        skipped = int(self.state.skips[1])
        if skipped and not math.isfinite(row["loss"]):  # the weights are of no use, though they may be finite
            raise Diverged(
                f"epoch {row['epoch']}, step {row['step']}: the validation loss is {row['loss']} and the last "
                f"{skipped} steps had gradients that are not finite; {ADVICE}"
            )
        scores = {name: row[key] for name, key in (("model", "top1"), ("ema", "ema_top1")) if key in row}
        weights = max(scores, key=lambda name: scores[name])
        is_best = progress.best.top1 is None or scores[weights] > progress.best.top1
        if is_best:
            progress.best = Best(scores[weights], row["epoch"], weights)
        progress.last_validation = row
        progress.epochs_completed += 1
        progress.steps_in_epoch = 0
        progress.epoch_loss_sum, progress.epoch_loss_count = 0.0, 0
        self.tracker.message(self.bottleneck.verdict(row["epoch"]))
        self.tracker.metrics(row)
        ends = progress.epochs_completed == self.settings.epochs or self._stopped()
        if is_best or ends or progress.epochs_completed % self.settings.checkpoint.every_epochs == 0:
            self._save(f"epoch-{progress.epochs_completed:03d}", is_best)

    def _validation_row(self, kind: str) -> dict[str, Any]:
        state = self.state
        self.runtime.share_buffers(state.model)
        try:
            with self.goodput.phase(VALIDATING):
                row = self._row(kind) | self.validate(state.model, self._stop_validation)
                if state.ema is not None:
                    self.runtime.share_buffers(state.ema.module)
                    ema = self.validate(state.ema.module, self._stop_validation).items()
                    row |= {f"ema_{name}": value for name, value in ema if name not in ("images", "quarantined")}
        except Interrupted:
            self._interrupt()  # a resumed run validates first
        return row

    def _stop_validation(self) -> bool:
        """Before each batch, whether the ranks stop here."""
        self.watchdog.beat()
        return self._interruption.agreed()

    def _row(self, kind: str) -> dict[str, Any]:
        progress = self.state.progress
        epoch = progress.epochs_completed + 1
        return {"kind": kind, "epoch": epoch, "step": progress.step, "samples": progress.samples}

    def _save(self, name: str, is_best: bool = False) -> None:
        state = self.state
        # All ranks' mean, so that a checkpoint can go on with another number of them.
        state.loss_sum.copy_(self.runtime.sum(state.loss_sum) / self.runtime.world_size)
        self._check_finite(float(state.loss_sum), int(state.skips[1]))
        with self.goodput.phase(SAVING):
            self.runtime.main_only(lambda: self.saver.save(state, name, is_best), None)
        self.goodput.record_save()
        self._saved_step = state.progress.step
        self.watchdog.beat()

    def _finish_saving(self) -> None:
        with self.goodput.phase(SAVING):
            self.runtime.main_only(lambda: self.saver.wait(must_succeed=True), None)
        self.watchdog.beat()
