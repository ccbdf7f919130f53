"""What train.py runs."""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torchvision.utils import save_image

from metaformer.assembly.parts import (
    colours,
    evaluation_feed,
    loader_name,
    locate_weights,
    make_feed,
    make_model,
    open_index,
    worker_count,
)
from metaformer.config import TrainConfig, fingerprint, to_yaml
from metaformer.data.device_transform import TrainingTransform, denormalize
from metaformer.data.index import ImageIndex, check_same_classes
from metaformer.data.loader import LoaderName
from metaformer.data.plan import TrainingPlan
from metaformer.errors import UserError
from metaformer.evaluation.accuracy import evaluate
from metaformer.models import load_weights, save_weights
from metaformer.numa import describe_cpus, keep_near_gpu
from metaformer.runtime import Runtime
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.make import make_tracker
from metaformer.tracking.run_folder import check_empty, open_run_folder
from metaformer.tracking.tracker import NullTracker, Tracker
from metaformer.training.bottleneck import Bottleneck
from metaformer.training.checkpoint import CheckpointFolder, WeightFiles
from metaformer.training.ema import make_ema
from metaformer.training.loop import LoopSettings, SoftBatch, Trainer
from metaformer.training.optimizer import make_optimizer
from metaformer.training.precision import Precision
from metaformer.training.schedule import Schedule
from metaformer.training.state import TrainState

PICTURE_IMAGES = 16


class Splits(NamedTuple):
    """The data set's two indices and what a label means."""

    train: ImageIndex
    val: ImageIndex
    num_classes: int


@contextmanager
def training(config: TrainConfig, runtime: Runtime) -> Iterator[Trainer]:
    """A trainer that stands where the run folder left off; its parts are closed at the end.

    Raises:
        UserError: something that the user gave cannot work; nothing has been trained then.
    """
    runtime.check_agreement("the configuration", fingerprint(config))
    runtime = keep_near_gpu(runtime) if config.loader.numa_affinity else runtime
    config.check_batches(runtime.world_size)
    precision = Precision(config.precision, runtime.device)
    splits = _splits(config, runtime)
    plan = _training_plan(config, runtime, splits)
    state = _new_state(config, runtime, splits, precision)
    checkpoints = CheckpointFolder(
        config.resolved_run_dir / "checkpoints",
        config.checkpoint.keep,
        config.model.name,
        WeightFiles(partial(save_weights, name=config.model.name), load_weights),
    )
    resumed_from = _resume(config, runtime, checkpoints, state)
    settings = _loop_settings(config, plan)
    network = runtime.distribute(state.model)  # before there are worker processes: it talks to the other ranks
    with ExitStack() as parts:
        transform = TrainingTransform(splits.num_classes, config.augmentation.label_smoothing, colours(config))
        train_feed = parts.enter_context(closing(make_feed(config, runtime, splits.train, plan, transform)))
        val_feed = parts.enter_context(closing(evaluation_feed(config, runtime, splits.val)))
        silent: Tracker = NullTracker()
        tracker = runtime.main_only(lambda: _tracker(config, settings, state), otherwise=silent)
        parts.push(lambda kind, error, trace: tracker.close(failed=kind is not None))
        for line in _describe(config, runtime, splits, settings, state):
            tracker.message(line)
        if resumed_from is not None:
            tracker.message(f"resuming     {resumed_from}, step {state.progress.step}")
        yield Trainer(
            state=state,
            network=network,
            data=train_feed,
            schedule=Schedule(config.schedule, state.optimizer, config.epochs, plan.steps_per_epoch),
            precision=precision,
            validate=lambda model: evaluate(model, val_feed, precision, runtime).as_dict() | _left_out(config, splits),
            checkpoints=checkpoints,
            tracker=tracker,
            runtime=runtime,
            settings=settings,
            bottleneck=Bottleneck(_advice(config, runtime)),
            inspect=partial(_picture, config, runtime, tracker),
        )


def training_result(config: TrainConfig, trainer: Trainer, validation: dict[str, Any]) -> dict[str, Any]:
    """What train.py prints last: the last validation, the best one, and where the run lies."""
    best = trainer.state.progress.best
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
    num_classes = config.num_classes or len(train.classes)
    if num_classes < len(train.classes):
        raise UserError(
            f"num_classes={num_classes}: {config.data.root} has {len(train.classes)} classes; "
            "leave it null to count them"
        )
    return Splits(train, val, num_classes)


def _left_out(config: TrainConfig, splits: Splits) -> dict[str, int]:
    """For the result, the files of both splits that a list leaves out."""
    return {"quarantined": splits.train.quarantined + splits.val.quarantined} if config.data.quarantine else {}


def _training_plan(config: TrainConfig, runtime: Runtime, splits: Splits) -> TrainingPlan:
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
        image_size=config.image_size,
        crop_pct=config.model.crop_pct,
        augmentation=config.augmentation,
        fill_last_batch=config.fill_last_batch,
    )


def _new_state(config: TrainConfig, runtime: Runtime, splits: Splits, precision: Precision) -> TrainState:
    model = make_model(config, splits.num_classes, runtime)
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
        identity={
            "model": config.model.name,
            "seed": config.seed,
            "global_batch_size": config.global_batch_size,
            "fill_last_batch": config.fill_last_batch,
            "data": splits.train.fingerprint[:16],
            "optimizer": f"{config.optimizer.name} of {config.optimizer.implementation.value}",
        },
    )


def _resume(config: TrainConfig, runtime: Runtime, checkpoints: CheckpointFolder, state: TrainState) -> Path | None:
    """Load the checkpoint that training goes on from, if there is one.

    `resume=FOLDER` with a checkpoint of this very run goes back to it. Any other folder is where a new run starts:
    once the run has a checkpoint of its own, the same command goes on from that.
    """
    run_dir, folder = config.resolved_run_dir, runtime.from_main(checkpoints.last)
    if config.resume == "never":
        runtime.main_only(lambda: check_empty(run_dir), None)
        return None
    if config.resume != "auto":
        given = Path(config.resume)
        if folder is None or given.resolve().parent == folder.parent:
            folder = given.resolve()
    if folder is not None:
        checkpoints.load(state, folder)
    return folder


def _loop_settings(config: TrainConfig, plan: TrainingPlan) -> LoopSettings:
    return LoopSettings(
        epochs=config.epochs + config.schedule.cooldown_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        accumulation_steps=config.accumulation_steps,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        log_every_steps=config.log_every_steps,
        checkpoint=config.checkpoint,
        clip_grad_norm=config.clip_grad_norm,
        max_steps=config.max_steps,
    )


def _tracker(config: TrainConfig, settings: LoopSettings, state: TrainState) -> Tracker:
    run_dir = config.resolved_run_dir
    changed = open_run_folder(run_dir, to_yaml(config))
    steps = settings.epochs * settings.steps_per_epoch
    console = ConsoleTracker(settings.epochs, steps, settings.global_batch_size, run_dir / "log.txt")
    if changed:
        console.message(f"changed      {', '.join(changed)}; the earlier configuration is kept beside config.yaml")
    if state.progress.epochs_completed >= settings.epochs:
        console.message(f"complete     {run_dir} has all its {settings.epochs} epochs; nothing is left to train")
        return console
    recorded: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return make_tracker(config.tracking, run_dir, console, state.progress.step, recorded)


def _describe(
    config: TrainConfig, runtime: Runtime, splits: Splits, settings: LoopSettings, state: TrainState
) -> Iterator[str]:
    """The numbers that were derived from the configuration, for people to check."""
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    rank_batch = config.global_batch_size // runtime.world_size // config.accumulation_steps
    lr = config.optimizer.learning_rate(config.global_batch_size)
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
    yield f"model        {config.model.name}, {parameters:,} parameters, {splits.num_classes} classes"
    root, train, val = splits.train.folder.parent, len(splits.train), len(splits.val)
    out = f"; {splits.train.quarantined:,} and {splits.val.quarantined:,} are left out by {config.data.quarantine}"
    yield f"data         {root}: {train:,} training, {val:,} validation images{out if config.data.quarantine else ''}"
    loader = loader_name(config, runtime).value
    yield f"loader       {loader}, augmentation {config.augmentation.name}, {config.image_size} px"
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


def _picture(config: TrainConfig, runtime: Runtime, tracker: Tracker, batch: SoftBatch) -> None:
    """A grid of the first training images as the network gets them."""
    if runtime.is_main:
        file = config.resolved_run_dir / "mixed_images.png"
        save_image(denormalize(batch.images[:PICTURE_IMAGES], colours(config)), file, nrow=4)
        tracker.picture("train/mixed_images", file)
