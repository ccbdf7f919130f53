"""The training loop: epochs of optimizer steps, with a validation and a checkpoint after each epoch."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor, nn

from metaformer.errors import Interrupted
from metaformer.goodput import SAVING, TRAINING, VALIDATING, Goodput
from metaformer.interfaces import Batch, BatchSource, Row, Tracker
from metaformer.training.config import LoopConfig
from metaformer.training.divergence import check_loss, check_validation
from metaformer.training.interruption import Interruption, StopWaitingError
from metaformer.training.meter import Meter
from metaformer.training.replicas import check_replicas
from metaformer.training.saver import CheckpointSaver
from metaformer.training.schedule import Schedule
from metaformer.training.step import Learner, discard_step, train_step
from metaformer.training.watchdog import Watchdog

# Evaluates a model and returns top1, top5, loss, images and quarantined. Calls its second argument before each batch,
# and raises Interrupted, on all ranks, if that returns True.
Validate = Callable[[nn.Module, Callable[[], bool]], Row]


@dataclass
class Trainer:
    """Trains from the position of the learner's state to the end.

    Attributes:
        inspect: called with the first batch, to save a picture of it.
    """

    learner: Learner
    data: BatchSource
    steps_per_epoch: int
    schedule: Schedule
    validate: Validate
    saver: CheckpointSaver
    tracker: Tracker
    watchdog: Watchdog
    goodput: Goodput
    meter: Meter
    config: LoopConfig
    inspect: Callable[[Batch], None]

    def __post_init__(self) -> None:
        self.state, self.runtime = self.learner.state, self.learner.runtime
        self.interruption = Interruption(self.runtime)
        self._last_step = self.config.last_step(self.steps_per_epoch)
        self._saved_step = self.state.progress.step
        self._most_skipped = min(self.config.guards.max_skipped_steps, self.steps_per_epoch)

    def run(self) -> Row:
        """Train, and return the row of the last validation.

        Raises:
            Interrupted: a signal asked training to stop; the state is saved.
            Diverged: the loss or the weights are not finite, or ranks differ.
        """
        progress = self.state.progress
        with self.interruption.listening():
            try:
                self.goodput.enter(TRAINING)
                while progress.step < self._last_step or progress.steps_in_epoch == self.steps_per_epoch:
                    self._train_epoch()
                    if progress.steps_in_epoch == self.steps_per_epoch:
                        self._complete_epoch()
                if not progress.validated:  # stopped in the middle of an epoch
                    progress.last_validation = self._validate("final")
                    self._save(f"step-{progress.step:08d}")
                self._finish()
            finally:
                self.watchdog.training_ends()
        return progress.last_validation

    def _train_epoch(self) -> None:
        """Take the remaining steps of the epoch, or those up to `max_steps`."""
        progress, config = self.state.progress, self.config
        self.learner.train_mode()
        batches = self._batches()
        self.tracker.progress(TRAINING, progress.step, self._last_step)
        self.meter.start()
        while progress.steps_in_epoch < self.steps_per_epoch and progress.step < self._last_step:
            lr = self.schedule.set(progress.step)
            is_last = progress.steps_in_epoch + 1 == self.steps_per_epoch or progress.step + 1 == self._last_step
            logs = is_last or (progress.step + 1) % config.log_every_steps == 0
            try:
                with self.watchdog.step():
                    grad_norm = train_step(self.learner, batches, measure_norm=logs)
            except StopWaitingError:
                discard_step(self.learner)
                self._interrupt()
            progress.count_step(config.global_batch_size)
            self.tracker.progress(TRAINING, progress.step, self._last_step)
            if grad_norm is not None:
                self._log(lr, grad_norm)
            self._end_step(is_last)

    def _batches(self) -> Iterator[Batch]:
        """Yield the rest of the epoch's batches; measure the wait for each, which a signal can end."""
        progress = self.state.progress
        first = progress.steps_in_epoch * self.config.accumulation
        loaded = self.data.epoch(progress.epochs_completed, first)
        for number in itertools.count():
            with self.interruption.waiting():
                batch = next(loaded)
            self.meter.waited(batch.waited, is_first=number == 0)
            if progress.step == 0 and number == 0:
                self.inspect(batch)
            yield batch

    def _log(self, lr: float, grad_norm: Tensor) -> None:
        """Log the steps since the last row. The host waits for the device only here and in saves."""
        reading = self.meter.read(lr, grad_norm)
        self.tracker.metrics(reading.row)
        if reading.straggler is not None:
            self.tracker.message(reading.straggler)
        check_loss(reading.row, reading.loss_sum, reading.skipped_in_a_row, self._most_skipped)

    def _end_step(self, is_last: bool) -> None:
        """Compare the ranks, save or stop if it is time to; all ranks do so after the same step."""
        state, step = self.state, self.state.progress.step
        compare_every, save_every = self.config.guards.compare_ranks_every_steps, self.config.checkpoint.every_steps
        self.watchdog.beat()
        if compare_every and step % compare_every == 0 and self.runtime.world_size > 1:
            check_replicas(state.model, self.runtime, step)
        # After a skipped step the weights may be unusable, so the save waits for the next step.
        if save_every and step >= self._saved_step + save_every and not is_last and not state.skipped_in_a_row:
            self._save(f"step-{step:08d}")
        if self.interruption.agreed():
            self._interrupt()

    def _complete_epoch(self) -> None:
        """Validate, and save if the epoch is the best, the last, or due."""
        progress, config = self.state.progress, self.config
        train_loss = progress.epoch_loss_sum / max(1, progress.epoch_loss_count)
        row = self._validate("validation") | {"train_loss": train_loss}
        check_validation(row, int(self.state.skipped_in_a_row))
        is_best = progress.complete_epoch(row)
        self.tracker.message(self.meter.bottleneck.verdict(row["epoch"]))
        self.tracker.metrics(row)
        is_last = progress.step >= self._last_step
        if is_best or is_last or progress.epochs_completed % config.checkpoint.every_epochs == 0:
            self._save(f"epoch-{progress.epochs_completed:03d}", is_best)

    def _validate(self, kind: str) -> Row:
        state = self.state
        row = state.progress.row(kind)
        try:
            with self.goodput.phase(VALIDATING), self.watchdog.compiling(VALIDATING):
                self.runtime.share_buffers(state.model)
                row |= self.validate(state.model, self._stops_validation)
                if state.ema is not None:
                    self.runtime.share_buffers(state.ema.module)
                    ema = self.validate(state.ema.module, self._stops_validation).items()
                    row |= {f"ema_{name}": value for name, value in ema if name not in ("images", "quarantined")}
        except Interrupted:
            self._interrupt()  # a resumed run validates first
        return row

    def _stops_validation(self) -> bool:
        self.watchdog.beat()
        return self.interruption.agreed()

    def _interrupt(self) -> NoReturn:
        """Save the state and end training."""
        step = self.state.progress.step
        if self._saved_step != step:
            self._save(f"step-{step:08d}")
        self._finish_saving()
        raise Interrupted(f"{self.interruption.reason}: step {step} is saved; the same command resumes there")

    def _save(self, name: str, is_best: bool = False) -> None:
        state = self.state
        # The mean over the ranks, so that training can resume on another number of ranks.
        state.loss_sum.copy_(self.runtime.sum(state.loss_sum) / self.runtime.world_size)
        check_loss(state.progress.row("train"), float(state.loss_sum), int(state.skipped_in_a_row), self._most_skipped)
        self._on_main(lambda: self.saver.save(state, name, is_best))
        self.goodput.record_save()
        self._saved_step = state.progress.step

    def _finish_saving(self) -> None:
        self._on_main(lambda: self.saver.wait(must_succeed=True))

    def _on_main(self, save: Callable[[], None]) -> None:
        """Run a part of saving on rank 0; the other ranks wait for it."""
        with self.goodput.phase(SAVING):
            self.runtime.from_main(save)
        self.watchdog.beat()

    def _finish(self) -> None:
        """End training: nothing is left to save or to agree on, and the trackers get the result."""
        self._finish_saving()
        self.interruption.finish_vote()
        for folder, aliases in self.saver.folder.aliases().items():
            self.tracker.checkpoint(folder, aliases)
        # This row comes last: a run without it is not complete, and repeats all of the above when it resumes.
        self.tracker.metrics(self.state.progress.last_validation | {"kind": "final"})
