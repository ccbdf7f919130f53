"""Builds and runs a training from its configuration."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchvision.utils import save_image

from metaformer.assembly.accumulation import prepare
from metaformer.assembly.adoption import make_record
from metaformer.assembly.description import describe
from metaformer.assembly.dry_run import dry_run
from metaformer.assembly.example_pictures import PICTURE_ERRORS, add_pictures
from metaformer.assembly.loading_advice import loading_advice
from metaformer.assembly.parts import colour_statistics, evaluation_feed
from metaformer.assembly.preparation import Preparation
from metaformer.assembly.run import Run, open_tracker
from metaformer.assembly.summary import summarize
from metaformer.assembly.training_validation import Validation
from metaformer.config import TrainConfig, redacted
from metaformer.data.device.transform import denormalize
from metaformer.errors import UserError, one_line
from metaformer.goodput import Goodput
from metaformer.interfaces import Batch, Row, Tracker
from metaformer.models import load_weights, save_state
from metaformer.runtime import Runtime
from metaformer.tracking.lock import lock_run_folder
from metaformer.tracking.run_folder import check_empty, check_is_for_runs, check_shared
from metaformer.training.bottleneck import Bottleneck
from metaformer.training.checkpoint import CheckpointFolder, ResumePoint, WeightFiles
from metaformer.training.interruption import interruptible_start
from metaformer.training.loop import Trainer
from metaformer.training.manifest import verify
from metaformer.training.meter import Meter
from metaformer.training.pointers import follow
from metaformer.training.saver import CheckpointSaver
from metaformer.training.schedule import Schedule
from metaformer.training.watchdog import Watchdog

GRID_IMAGES = 16


@contextmanager
def build_training(config: TrainConfig, runtime: Runtime, watchdog: Watchdog) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield a function that trains from the last checkpoint, if any, and returns the result that train.py prints.

    With `dry_run`, the function takes a few steps instead, and writes nothing.

    Args:
        watchdog: A watchdog that is already running.
    """
    prepared = prepare(config, runtime)
    if config.dry_run:
        yield partial(dry_run, prepared)
        return
    config, runtime, splits = prepared.config, prepared.runtime, prepared.splits
    state, steps_per_epoch = prepared.state, prepared.plan.steps_per_epoch
    runtime.from_main(partial(check_is_for_runs, config.resolved_run_dir))
    with ExitStack() as stack:
        lock = runtime.main_only(lambda: stack.enter_context(lock_run_folder(config.resolved_run_dir)), None)
        check_shared(config.resolved_run_dir, runtime)
        checkpoints = _checkpoints(prepared)
        resume_point = _resume(prepared, checkpoints)
        if state.progress.epochs_completed < config.total_epochs:
            runtime.main_only(lambda: checkpoints.probe(state.size()), None)
        network = prepared.distribute()
        train_feed = stack.enter_context(closing(prepared.feed()))
        val_feed = stack.enter_context(closing(evaluation_feed(config, prepared.images, runtime, splits.val)))
        startup = stack.enter_context(ExitStack())  # closed when training handles signals itself
        startup.enter_context(interruptible_start())
        goodput = Goodput()
        run = Run(config, runtime.world_size, steps_per_epoch, state, prepared.fused, goodput)
        tracker = stack.enter_context(open_tracker(run, runtime))
        _log_start(prepared, resume_point, tracker)
        check_lock = (lambda: None) if lock is None else lock.check
        saver = CheckpointSaver(checkpoints, config.checkpoint, tracker.message, check_lock)
        stack.enter_context(closing(saver))
        processes = runtime.processes()
        bottleneck = Bottleneck(loading_advice(config, runtime, splits.train))
        learner = prepared.learner(network)
        trainer = Trainer(
            learner=learner,
            data=train_feed,
            steps_per_epoch=steps_per_epoch,
            schedule=Schedule(config.schedule, state.optimizer, config.epochs, steps_per_epoch),
            validate=Validation(config, runtime, splits, val_feed, prepared.precision, state, tracker),
            saver=saver,
            tracker=tracker,
            watchdog=watchdog,
            goodput=goodput,
            meter=Meter(learner, [process.host for process in processes], goodput, bottleneck),
            config=config,
            inspect=partial(_save_image_grid, prepared, tracker),
        )
        peers = [process.pid for process in processes if process.node == runtime.node]
        watchdog.training_begins(config.resolved_run_dir / "stacks", peers, lambda: trainer.interruption.pending)
        startup.close()
        yield partial(_train, prepared, trainer)


def _log_start(prepared: Preparation, resume_point: ResumePoint, tracker: Tracker) -> None:
    """Log the run's settings, and where it resumes or what it starts from."""
    runtime, state = prepared.runtime, prepared.state
    notes = prepared.notes
    description: Iterable[str] = ()
    if runtime.is_main:
        steps_per_epoch = prepared.plan.steps_per_epoch
        description = describe(prepared.config, prepared.images, runtime, prepared.splits, state, steps_per_epoch)
    if resume_point.folder is not None:
        notes = [f"resuming     {resume_point.folder}, step {state.progress.step}"]
    for line in [*resume_point.skipped, *description, *prepared.lines, *notes]:
        tracker.message(line)


def _train(prepared: Preparation, trainer: Trainer) -> dict[str, Any]:
    """Train, log a summary, and return the result."""
    config, state, goodput = prepared.config, prepared.state, trainer.goodput
    samples, before = state.progress.samples, goodput.spent().step_seconds
    validation = trainer.run()
    if config.report.enabled:
        prepared.runtime.main_only(partial(_add_pictures, prepared, validation, trainer.tracker), None)
    spent = goodput.spent()
    trained = state.progress.samples - samples
    speed = trained / (spent.step_seconds - before) if trained else 0.0
    for line in summarize(config, state.progress, validation, speed, spent):
        trainer.tracker.message(line)
    figures = {name: value for name, value in validation.items() if name not in ("kind", "samples")}
    best = state.progress.best
    return {
        "model": config.model.name,
        **figures,
        "best_top1": best.top1,
        "best_epoch": best.epoch,
        "best_weights": best.weights,
        "run_dir": str(config.resolved_run_dir),
        "fused": prepared.fused,
    }


def _checkpoints(prepared: Preparation) -> CheckpointFolder:
    config, splits = prepared.config, prepared.splits
    config_yaml = OmegaConf.to_yaml(redacted(config)).encode()
    facts = {
        "model": config.model.name,
        "world_size": prepared.runtime.world_size,
        "config_sha256": hashlib.sha256(config_yaml).hexdigest(),
    }
    record = make_record(config, prepared.images, splits.num_classes, splits.train.classes)
    weight_files = WeightFiles(partial(save_state, network=record), load_weights)
    return CheckpointFolder(config.resolved_run_dir / "checkpoints", config.checkpoint, facts, weight_files)


def _resume(prepared: Preparation, checkpoints: CheckpointFolder) -> ResumePoint:
    """Load the checkpoint to resume from, if there is one.

    `resume=FOLDER` goes back to that checkpoint if it belongs to this run. Any other checkpoint is the start of a new
    run, which the same command resumes from the run's own checkpoints once it has one.
    """
    resume, run_dir = prepared.config.resume, prepared.config.resolved_run_dir

    def find() -> ResumePoint:
        if resume == "never":
            check_empty(run_dir)
            return ResumePoint(None)
        chosen = None if resume == "auto" else follow(Path(resume)).resolve()
        is_own = chosen is not None and chosen.parent == (run_dir / "checkpoints").resolve()
        found = ResumePoint(None) if is_own else checkpoints.find()
        if chosen is None or found.folder is not None:
            return found
        if not chosen.is_dir() or (chosen / "checkpoints").is_dir():
            kind = "a run folder" if chosen.is_dir() else "no such folder"
            raise UserError(f"resume={resume}: {kind}; give a checkpoint, such as RUN/checkpoints/last")
        verify(chosen)
        return ResumePoint(chosen)

    found = prepared.runtime.from_main(find)
    if found.folder is not None:
        checkpoints.load(prepared.state, found.folder)
    return found


def _add_pictures(prepared: Preparation, validation: Row, tracker: Tracker) -> None:
    """Add pictures to the list of the images that the better of weights and EMA predicts worst and best."""
    state, ema = prepared.state, prepared.state.ema
    is_ema = ema is not None and validation["ema_top1"] > validation["top1"]
    model = ema.module if ema is not None and is_ema else state.model
    file = prepared.config.resolved_run_dir / "validation" / f"{'ema_' if is_ema else ''}images.json"
    if file.is_file():
        try:
            add_pictures(file, model, prepared.config, prepared.images, prepared.splits.val, prepared.runtime)
        except PICTURE_ERRORS as error:
            tracker.message(f"warning      {file}: pictures cannot be added ({one_line(error)})")


def _save_image_grid(prepared: Preparation, tracker: Tracker, batch: Batch) -> None:
    """Save a grid of the first training images as the network receives them."""
    if prepared.runtime.is_main:
        file = prepared.config.resolved_run_dir / "mixed_images.png"
        pixels = denormalize(batch.images[:GRID_IMAGES], colour_statistics(prepared.images))
        try:
            save_image(pixels, file, nrow=4)
        except OSError as error:  # not worth ending the training
            tracker.message(f"warning      {file}: cannot be written ({error.strerror or error})")
        else:
            tracker.picture("train/mixed_images", file)
