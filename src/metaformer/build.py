"""From a configuration to objects: the only file that knows every component."""

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

from metaformer.config import CommonConfig, TrainConfig, ValidateConfig, fingerprint, to_yaml
from metaformer.data.dali_loader import DaliLoader, dali_is_installed
from metaformer.data.device_transform import TrainingTransform, denormalize
from metaformer.data.feed import Feed, Target, Transform, evaluation_transform
from metaformer.data.index import ImageIndex, Source, check_same_classes, load_index
from metaformer.data.loader import Loader, LoaderName
from metaformer.data.pil_reader import read_with_pil
from metaformer.data.plan import EvaluationPlan, Plan, TrainingPlan
from metaformer.data.sample import build_sample
from metaformer.data.torch_reader import read_with_torch
from metaformer.data.worker_loader import WorkerLoader
from metaformer.errors import UserError
from metaformer.evaluation.accuracy import evaluate
from metaformer.evaluation.results import append_result
from metaformer.models import create_model, create_timm_model, load_weights, save_weights
from metaformer.models.token_mixers import check_pooling
from metaformer.models.variants import Library
from metaformer.runtime import Runtime
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.make import make_tracker
from metaformer.tracking.run_folder import check_empty, open_run_folder
from metaformer.tracking.tracker import NullTracker, Tracker
from metaformer.training.checkpoint import CheckpointFolder, WeightFiles, find_weights
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
        transform = TrainingTransform(splits.num_classes, config.augmentation.label_smoothing)
        train_feed = parts.enter_context(closing(_feed(config, runtime, splits.train, plan, transform)))
        val_feed = parts.enter_context(closing(_evaluation_feed(config, runtime, splits.val)))
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
            validate=lambda model: evaluate(model, val_feed, precision, runtime).as_dict(),
            checkpoints=checkpoints,
            tracker=tracker,
            runtime=runtime,
            settings=settings,
            inspect=partial(_picture, config.resolved_run_dir, runtime, tracker),
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


@contextmanager
def validation(config: ValidateConfig, runtime: Runtime) -> Iterator[Callable[[], dict[str, Any]]]:
    """A function that evaluates, writes the results file, and returns what validate.py prints last.

    Raises:
        UserError: something that the user gave cannot work.
    """
    runtime.check_agreement("the configuration", fingerprint(config))
    precision = Precision(config.precision, runtime.device)
    assert config.checkpoint is not None
    weights = find_weights("checkpoint", Path(config.checkpoint), config.use_ema)
    splits = _splits(config, runtime)
    model = _model(config, splits.num_classes, runtime)
    load_weights(model, weights)

    def run(feed: Feed) -> dict[str, Any]:
        accuracy = evaluate(model, feed, precision, runtime)
        if config.results_csv is not None:
            row: dict[str, str | int | float] = {
                "model": config.model.name,
                "img_size": config.image_size,
                "top1": accuracy.top1,
                "top5": accuracy.top5,
                "param_count": sum(p.numel() for p in model.parameters()),
                "crop_pct": config.model.crop_pct,
                "interpolation": "bicubic",
            }
            path = Path(config.results_csv)
            runtime.main_only(lambda: append_result(path, row), None)
        return {"model": config.model.name, **accuracy.as_dict(), "checkpoint": str(weights)}

    with closing(_evaluation_feed(config, runtime, splits.val)) as feed:
        yield partial(run, feed)


def _splits(config: CommonConfig, runtime: Runtime) -> Splits:
    root = Path(config.data.root)
    if config.data.source is Source.sample:
        runtime.main_only(lambda: None if root.exists() else build_sample(root), None)
    train, val = (
        runtime.main_first(partial(load_index, root, split))
        for split in (config.data.train_split, config.data.val_split)
    )
    runtime.check_agreement(f"the data set in {root}", train.fingerprint + val.fingerprint)
    check_same_classes(train, val)
    num_classes = config.num_classes or len(train.classes)
    if num_classes < len(train.classes):
        raise UserError(
            f"num_classes={num_classes}: {root} has {len(train.classes)} classes; leave it null to count them"
        )
    return Splits(train, val, num_classes)


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
    )


def _model(config: CommonConfig, num_classes: int, runtime: Runtime) -> nn.Module:
    """The network on the device; equal on all ranks, because all start from the seed."""
    torch.manual_seed(config.seed)
    create = create_timm_model if config.model.library is Library.timm else create_model
    model: nn.Module = create(config.model.name, num_classes, config.model.drop_path_rate)
    if config.channels_last and config.model.library is Library.metaformer:
        check_pooling(runtime.device)
    model = model.to(runtime.device, memory_format=_memory_format(config))  # type: ignore[call-overload]
    if config.compile:
        model.compile()  # in place: the state dict keeps its keys
    return model


def _memory_format(config: CommonConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _new_state(config: TrainConfig, runtime: Runtime, splits: Splits, precision: Precision) -> TrainState:
    model = _model(config, splits.num_classes, runtime)
    if config.init_weights is not None:
        load_weights(model, find_weights("init_weights", Path(config.init_weights), use_ema=False))
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


def _feed(config: CommonConfig, runtime: Runtime, index: ImageIndex, plan: Plan, transform: Transform) -> Feed:
    workers = runtime.cpus_per_rank() if config.workers is None else config.workers
    name = _loader_name(config, runtime)
    loader: Loader
    if name is LoaderName.dali:
        loader = DaliLoader(index, plan, config.loader, runtime.device, max(1, workers))
    else:
        read = read_with_torch if name is LoaderName.torch else read_with_pil
        pin_memory = runtime.device.type == "cuda"
        loader = WorkerLoader(read, index, plan, workers, config.loader.prefetch_batches, pin_memory)
    return Feed(index, plan, loader, transform, Target(runtime.device, _memory_format(config)))


def _loader_name(config: CommonConfig, runtime: Runtime) -> LoaderName:
    if config.loader.name is not LoaderName.auto:
        return config.loader.name
    randaugment = isinstance(config, TrainConfig) and config.augmentation.randaugment.num_ops > 0
    dali = runtime.device.type == "cuda" and not randaugment and dali_is_installed()
    return LoaderName.dali if dali else LoaderName.torch


def _evaluation_feed(config: CommonConfig, runtime: Runtime, index: ImageIndex) -> Feed:
    plan = EvaluationPlan(
        num_samples=len(index),
        batch_size=config.eval_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        image_size=config.image_size,
        crop_pct=config.model.crop_pct,
    )
    return _feed(config, runtime, index, plan, evaluation_transform)


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
    yield f"data         {root}: {train:,} training, {val:,} validation images"
    loader = _loader_name(config, runtime).value
    yield f"loader       {loader}, augmentation {config.augmentation.name}, {config.image_size} px"
    yield f"device       {runtime.world_size} x {device}, {config.precision.name.value}"
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


def _picture(run_dir: Path, runtime: Runtime, tracker: Tracker, batch: SoftBatch) -> None:
    """A grid of the first training images as the network gets them."""
    if runtime.is_main:
        file = run_dir / "mixed_images.png"
        save_image(denormalize(batch.images[:PICTURE_IMAGES]), file, nrow=4)
        tracker.picture("train/mixed_images", file)
