"""What train.py runs."""

import hashlib
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.utils import save_image

from metaformer.assembly.fusion import choose_transform
from metaformer.assembly.parts import (
    colours,
    evaluation_feed,
    example_images,
    loader_name,
    locate_weights,
    make_feed,
    make_model,
    open_index,
    prepare_workers,
    worker_count,
)
from metaformer.assembly.preprocessing import resolve
from metaformer.assembly.run import tracking
from metaformer.config import TrainConfig, fingerprint, redacted
from metaformer.data.device.transform import TrainingTransform, denormalize
from metaformer.data.index.image_index import ImageIndex, check_same_classes
from metaformer.data.load.config import LoaderName
from metaformer.data.plan.plan import TrainingPlan
from metaformer.errors import UserError
from metaformer.evaluation.accuracy import evaluate
from metaformer.goodput import Goodput
from metaformer.interfaces import Batch, Tracker
from metaformer.models import load_weights, save_state
from metaformer.models.config import ResizeFilter
from metaformer.models.norms import find_single_value_batch_norm
from metaformer.models.preprocessing import Preprocessing
from metaformer.numa import describe_cpus, keep_near_gpu
from metaformer.runtime import Runtime
from metaformer.tracking.environment import code_fingerprint
from metaformer.tracking.lock import lock_run_folder
from metaformer.tracking.run_folder import check_empty, check_shared
from metaformer.training.bottleneck import Bottleneck
from metaformer.training.checkpoint import CheckpointFolder, ResumePoint, WeightFiles
from metaformer.training.config import LoopSettings
from metaformer.training.ema import make_ema
from metaformer.training.interruption import interruptible_start
from metaformer.training.loop import Trainer
from metaformer.training.manifest import verify
from metaformer.training.optimizer import make_optimizer
from metaformer.training.pointers import follow
from metaformer.training.precision import Precision
from metaformer.training.saver import CheckpointSaver
from metaformer.training.schedule import Schedule
from metaformer.training.state import Best, TrainState
from metaformer.training.watchdog import Watchdog

PICTURE_IMAGES = 16


class Splits(NamedTuple):
    """The data set's two indices and what a label means."""

    train: ImageIndex
    val: ImageIndex
    num_classes: int


@contextmanager
def training(config: TrainConfig, runtime: Runtime, watchdog: Watchdog) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that trains from where the run folder left off, and returns what train.py prints last.

    Args:
        watchdog: it watches already.

    Raises:
        UserError: something that the user gave cannot work; nothing has been trained then.
    """
    runtime.check_agreement("the code of metaformer, or the version of torch,", code_fingerprint())
    config, images = resolve(config, config.init_weights)
    runtime.check_agreement("the configuration", fingerprint(config))
    runtime = keep_near_gpu(runtime) if config.loader.numa_affinity else runtime
    config.check_batches(runtime.world_size)
    prepare_workers(config, runtime)
    precision = Precision(config.precision, runtime.device)
    splits = _splits(config, runtime)
    plan = _training_plan(config, images, runtime, splits)
    model, fused_blocks = make_model(config, images, splits.num_classes, runtime, precision.dtype)
    _check_batch_norm(config, images, runtime, model)
    transform_images, fused_transform = choose_transform(config, images, runtime)
    fused = f"blocks {fused_blocks}; transform {fused_transform}"
    state = _new_state(config, images, runtime, splits, precision, model)
    with ExitStack() as parts:
        lock = runtime.main_only(lambda: parts.enter_context(lock_run_folder(config.resolved_run_dir)), None)
        check_shared(config.resolved_run_dir, runtime)
        checkpoints = _checkpoints(config, runtime)
        found = _resume(config, runtime, checkpoints, state)
        settings = _loop_settings(config, plan)
        if state.progress.epochs_completed < settings.epochs:
            runtime.main_only(lambda: checkpoints.probe(state.size()), None)
        # Before there are worker processes: it talks to the other ranks.
        example = example_images(config, images, runtime)
        network = runtime.distribute(state.model, example, config.precision.reduce_in_bf16)
        transform = TrainingTransform(
            splits.num_classes,
            config.augmentation.label_smoothing,
            colours(images),
            transform_images,
        )
        train_feed = parts.enter_context(closing(make_feed(config, runtime, splits.train, plan, transform)))
        val_feed = parts.enter_context(closing(evaluation_feed(config, images, runtime, splits.val)))
        starting = parts.enter_context(ExitStack())  # from where a start counts until training listens to signals
        starting.enter_context(interruptible_start())
        goodput = Goodput()
        tracker = parts.enter_context(tracking(config, runtime, settings, state, fused, goodput))
        described = _describe(config, images, runtime, splits, settings, state)
        for line in [*found.skipped, *described, f"fused        {fused}"]:
            tracker.message(line)
        if found.folder is not None:
            tracker.message(f"resuming     {found.folder}, step {state.progress.step}")
        check_lock = (lambda: None) if lock is None else lock.check
        saver = CheckpointSaver(checkpoints, config.checkpoint, tracker.message, check_lock)
        parts.enter_context(closing(saver))
        processes = runtime.processes()
        trainer = Trainer(
            state=state,
            network=network,
            data=train_feed,
            schedule=Schedule(config.schedule, state.optimizer, config.epochs, plan.steps_per_epoch),
            precision=precision,
            validate=lambda model, stop: (
                evaluate(model, val_feed, precision, runtime, stop=stop).as_dict() | _left_out(config, splits)
            ),
            saver=saver,
            tracker=tracker,
            runtime=runtime,
            processes=processes,
            watchdog=watchdog,
            goodput=goodput,
            settings=settings,
            bottleneck=Bottleneck(_advice(config, runtime)),
            inspect=partial(_picture, config, images, runtime, tracker),
        )
        peers = [process.pid for process in processes if process.node == runtime.node]
        watchdog.training_begins(config.resolved_run_dir / "stacks", peers, lambda: trainer.is_asked_to_stop)
        starting.close()
        yield lambda: _result(config, trainer.run(), state.progress.best) | {"fused": fused}


def _result(config: TrainConfig, validation: dict[str, Any], best: Best) -> dict[str, Any]:
    """The last validation, the best one, and where the run folder is."""
    figures = {name: value for name, value in validation.items() if name not in ("kind", "samples")}
    return {
        "model": config.model.name,
        **figures,
        "best_top1": best.top1,
        "best_epoch": best.epoch,
        "best_weights": best.weights,
        "run_dir": str(config.resolved_run_dir),
    }


def _splits(config: TrainConfig, runtime: Runtime) -> Splits:
    assert config.data.train_split is not None
    train, val = (open_index(config, runtime, split) for split in (config.data.train_split, config.data.val_split))
    check_same_classes(train, val)
    found = len(train.classes)
    num_classes = config.num_classes or found
    if num_classes < found or (num_classes > found and not config.allow_unused_classes):
        unused = "" if num_classes < found else ", or give allow_unused_classes=true to keep outputs without images"
        raise UserError(
            f"num_classes={num_classes}: {config.data.root} has {found} classes; leave it null to count them{unused}"
        )
    return Splits(train, val, num_classes)


def _left_out(config: TrainConfig, splits: Splits) -> dict[str, int]:
    """For the result, the files of both splits that a list leaves out."""
    return {"quarantined": splits.train.quarantined + splits.val.quarantined} if config.data.quarantine else {}


def _checkpoints(config: TrainConfig, runtime: Runtime) -> CheckpointFolder:
    kept = OmegaConf.to_yaml(redacted(config)).encode()
    facts = {
        "model": config.model.name,
        "world_size": runtime.world_size,
        "config_sha256": hashlib.sha256(kept).hexdigest(),
    }
    weight_files = WeightFiles(partial(save_state, name=config.model.name), load_weights)
    return CheckpointFolder(config.resolved_run_dir / "checkpoints", config.checkpoint, facts, weight_files)


def _training_plan(config: TrainConfig, images: Preprocessing, runtime: Runtime, splits: Splits) -> TrainingPlan:
    if len(splits.train) < config.global_batch_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: {splits.train.folder} has only {len(splits.train)} images"
        )
    return TrainingPlan(
        num_samples=len(splits.train),
        global_batch_size=config.global_batch_size,
        accumulation_steps=config.accumulation_steps,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.seed,
        image_size=images.image_size,
        crop_pct=images.crop_pct,
        augmentation=config.augmentation,
        fill_last_batch=config.fill_last_batch,
        bicubic=images.interpolation is ResizeFilter.bicubic,
        fill=images.mean_colour,
    )


def _check_batch_norm(config: TrainConfig, images: Preprocessing, runtime: Runtime, model: nn.Module) -> None:
    """BatchNorm needs more than one value per channel: one image a pass may be too few."""
    if config.rank_batch_size(runtime.world_size) > 1:
        return
    norm = find_single_value_batch_norm(model, example_images(config, images, runtime))
    if norm is not None:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: one image per rank and accumulation step, of which {norm} "
            f"(BatchNorm) gets one value per channel at image_size={images.image_size}; give at least "
            f"{2 * config.global_batch_size}, or fewer ranks or accumulation_steps"
        )


def _new_state(
    config: TrainConfig,
    images: Preprocessing,
    runtime: Runtime,
    splits: Splits,
    precision: Precision,
    model: nn.Module,
) -> TrainState:
    if config.init_weights is not None:
        weights = runtime.from_main(partial(locate_weights, "init_weights", config.init_weights, use_ema=False))
        load_weights(model, weights.path)
    lr = config.optimizer.learning_rate(config.global_batch_size)
    return TrainState(
        model=model,
        ema=make_ema(config.ema, model),
        optimizer=make_optimizer(config.optimizer, model, lr),
        scaler=precision.scaler,
        loss_sum=torch.zeros((), dtype=torch.float64, device=runtime.device),
        skips=torch.zeros(2, dtype=torch.float64, device=runtime.device),
        identity={
            "model": config.model.name,
            "seed": config.seed,
            "global_batch_size": config.global_batch_size,
            "fill_last_batch": config.fill_last_batch,
            "data": splits.train.fingerprint[:16],
            **images.settings,
            "optimizer": f"{config.optimizer.name} of {config.optimizer.implementation.value}",
        },
    )


def _resume(config: TrainConfig, runtime: Runtime, checkpoints: CheckpointFolder, state: TrainState) -> ResumePoint:
    """Load the checkpoint that training goes on from, if there is one.

    `resume=FOLDER` with a checkpoint of this very run goes back to it. Any other folder is where a new run starts:
    once the run has a checkpoint of its own, the same command goes on from that.
    """
    run_dir = config.resolved_run_dir

    def find() -> ResumePoint:
        if config.resume == "never":
            check_empty(run_dir)
            return ResumePoint(None)
        given = None if config.resume == "auto" else follow(Path(config.resume)).resolve()
        found = (
            ResumePoint(None) if given and given.parent == (run_dir / "checkpoints").resolve() else checkpoints.find()
        )
        if given is not None and found.folder is None:
            verify(given)
            found = ResumePoint(given)
        return found

    found = runtime.from_main(find)
    if found.folder is not None:
        checkpoints.load(state, found.folder)
    return found


def _loop_settings(config: TrainConfig, plan: TrainingPlan) -> LoopSettings:
    return LoopSettings(
        epochs=config.epochs + config.schedule.cooldown_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        accumulation_steps=config.accumulation_steps,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        log_every_steps=config.log_every_steps,
        checkpoint=config.checkpoint,
        guards=config.guards,
        clip_grad_norm=config.clip_grad_norm,
        max_steps=config.max_steps,
    )


def _describe(
    config: TrainConfig,
    images: Preprocessing,
    runtime: Runtime,
    splits: Splits,
    settings: LoopSettings,
    state: TrainState,
) -> Iterator[str]:
    """The numbers that were derived from the configuration, for people to check."""
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    rank_batch = config.rank_batch_size(runtime.world_size)
    lr = config.optimizer.learning_rate(config.global_batch_size)
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
    yield f"model        {config.model.name}, {parameters:,} parameters, {splits.num_classes} classes"
    root, train, val = splits.train.folder.parent, len(splits.train), len(splits.val)
    out = f"; {splits.train.quarantined:,} and {splits.val.quarantined:,} are left out by {config.data.quarantine}"
    yield f"data         {root}: {train:,} training, {val:,} validation images{out if config.data.quarantine else ''}"
    yield from (f"data         {note}" for note in (*splits.train.notes, *splits.val.notes))
    loader = loader_name(config, runtime).value
    yield f"loader       {loader}, augmentation {config.augmentation.name}"
    yield f"images       {images}"
    yield f"device       {runtime.world_size} x {device}, {config.precision.name.value}"
    if runtime.bound_cpus:
        yield f"affinity     each rank near its GPU, rank 0 on CPUs {describe_cpus(runtime.bound_cpus)}"
    yield (
        f"batch        {config.global_batch_size} images = {runtime.world_size} (ranks) x {rank_batch} "
        f"x {config.accumulation_steps} (accumulation)"
    )
    yield f"optimizer    {config.optimizer.name}, lr {lr:.3g}, weight decay {config.optimizer.weight_decay:g}"
    schedule = config.schedule
    yield (
        f"schedule     {settings.epochs} epochs x {settings.steps_per_epoch} steps: {schedule.warmup_epochs} warm-up, "
        f"cosine over {config.epochs}, {schedule.cooldown_epochs} cool-down, per {schedule.unit.value}"
    )
    yield f"run folder   {shlex.quote(str(config.resolved_run_dir))}"
    if schedule.warmup_epochs >= config.epochs:
        yield f"warning      the warm-up is as long as epochs={config.epochs}: the peak lr is never reached"


def _advice(config: TrainConfig, runtime: Runtime) -> str:
    """What makes data come faster."""
    workers = worker_count(config, runtime)
    if loader_name(config, runtime) is LoaderName.dali:
        return f"raise workers (now {workers}) or loader.prefetch_batches (now {config.loader.prefetch_batches})"
    faster = "loader=dali" if runtime.device.type == "cuda" else "loader=torch"
    other = "" if loader_name(config, runtime).value in faster else f", or use {faster}"
    return f"raise workers (now {workers}, {runtime.cpus_per_rank()} CPU cores){other}"


def _picture(config: TrainConfig, images: Preprocessing, runtime: Runtime, tracker: Tracker, batch: Batch) -> None:
    """A grid of the first training images as the network gets them."""
    if runtime.is_main:
        file = config.resolved_run_dir / "mixed_images.png"
        try:
            save_image(denormalize(batch.images[:PICTURE_IMAGES], colours(images)), file, nrow=4)
        except OSError as error:  # no reason not to train
            tracker.message(f"warning      {file}: cannot be written ({error.strerror or error})")
        else:
            tracker.picture("train/mixed_images", file)
