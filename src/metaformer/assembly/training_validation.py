"""Validates during training, and writes the files of each validation."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from metaformer.assembly.splits import Splits
from metaformer.config import TrainConfig
from metaformer.data.feed import Feed
from metaformer.evaluation.accuracy import evaluate
from metaformer.evaluation.class_counts import ClassCounts, ClassTotals
from metaformer.evaluation.class_files import write_confusion, write_per_class
from metaformer.evaluation.extremes import Extremes, Scored, write_extremes
from metaformer.evaluation.scoring import Scores
from metaformer.goodput import VALIDATING
from metaformer.interfaces import Row, Tracker
from metaformer.runtime import Runtime
from metaformer.training.precision import Precision
from metaformer.training.state import TrainState

MAX_CLASSES = 21_841  # in per_class.csv


@dataclass(frozen=True)
class Validation:
    """Evaluates the weights or their average, and writes the results of each class to the run folder."""

    config: TrainConfig
    runtime: Runtime
    splits: Splits
    feed: Feed
    precision: Precision
    state: TrainState
    tracker: Tracker

    def __call__(self, model: nn.Module, stop: Callable[[], bool]) -> Row:
        """Evaluate a model, and return the figures for a row of metrics; see `training.loop.Validate`."""
        counts = ClassCounts(self.splits.num_classes, self.runtime.device)
        extremes, batches = Extremes(self.runtime), itertools.count()

        def observe(targets: Tensor, scores: Scores) -> None:
            counts.add(targets, scores)
            extremes.add(targets, scores)

        def stop_and_report() -> bool:
            self.tracker.progress(VALIDATING, next(batches), self.feed.rounds_per_epoch)
            return stop()

        accuracy = evaluate(model, self.feed, self.precision, self.runtime, stop=stop_and_report, observe=observe)
        totals, examples = counts.total(self.runtime), extremes.total()
        if self.runtime.is_main:
            self._write(totals, examples, prefix="" if model is self.state.model else "ema_")
        return accuracy.as_dict() | self._quarantined()

    def _write(self, totals: ClassTotals, examples: tuple[list[Scored], list[Scored]], prefix: str) -> None:
        folder, classes = self.config.resolved_run_dir, self.splits.val.classes
        try:
            if len(classes) <= MAX_CLASSES:
                write_per_class(folder / f"{prefix}per_class.csv", classes, totals)
            confusion = folder / "validation" / f"{prefix}confusion.npz"
            step = self.state.progress.step
            write_confusion(confusion, classes, totals, step)
            write_extremes(
                folder / "validation" / f"{prefix}images.json", examples, step, self.splits.val.name, classes
            )
        except OSError as error:  # not worth ending the training
            self.tracker.message(
                f"warning      {error.filename or folder}: results by class cannot be written "
                f"({error.strerror or error})"
            )

    def _quarantined(self) -> Row:
        """Return the number of files that data.quarantine excludes from both splits."""
        train, val, _ = self.splits
        return {"quarantined": train.quarantined + val.quarantined} if self.config.data.quarantine else {}
