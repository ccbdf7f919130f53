"""Describes the settings of a run in human-readable lines."""

import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

import torch

from metaformer.assembly.parts import loader_name
from metaformer.assembly.splits import Splits
from metaformer.config import TrainConfig
from metaformer.errors import one_line
from metaformer.models import Composition, create_model
from metaformer.models.config import Library, ModelConfig, Preprocessing
from metaformer.numa import describe_cpus
from metaformer.reporting.complexity import count_complexity
from metaformer.runtime import Runtime
from metaformer.training.state import TrainState


def describe(
    config: TrainConfig,
    images: Preprocessing,
    runtime: Runtime,
    splits: Splits,
    state: TrainState,
    steps_per_epoch: int,
) -> Iterator[str]:
    """Yield the lines that a run logs first: its settings, including those derived from the configuration."""
    parameters = f"{sum(p.numel() for p in state.model.parameters() if p.requires_grad):,} parameters"
    rank_batch = config.rank_batch_size(runtime.world_size)
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
    size = f"{parameters}{_describe_macs(config.model, images, splits.num_classes)}"
    yield f"model        {config.model.name}, {size}, {splits.num_classes} classes"
    if config.model.target is not None:
        options = "".join(f", {name}={value}" for name, value in config.model.options.items())
        yield f"target       {config.model.target}{options}"
    if config.model.composition is not None:
        parts = _describe_parts(config.model.composition)
        yield from textwrap.wrap(parts, 80, initial_indent="parts        ", subsequent_indent="parts        ")
    root, train, val = splits.train.folder.parent, len(splits.train), len(splits.val)
    yield f"data         {root}: {train:,} training, {val:,} validation images"
    if config.data.quarantine is not None:
        excluded = f"{splits.train.quarantined:,} and {splits.val.quarantined:,} more"
        yield f"data         {excluded} are excluded by {config.data.quarantine}"
    yield from (f"data         {note}" for note in (*splits.train.notes, *splits.val.notes))
    loader = loader_name(config, runtime).value
    yield f"loader       {loader}, augmentation {config.augmentation.name}"
    yield from images.lines
    yield f"device       {runtime.world_size} x {device}, {config.precision.name.value}"
    if runtime.bound_cpus:
        yield f"affinity     each rank near its GPU, rank 0 on CPUs {describe_cpus(runtime.bound_cpus)}"
    yield (
        f"batch        {config.global_batch_size} images = {runtime.world_size} (ranks) x {rank_batch} "
        f"x {config.accumulation} (accumulation)"
    )
    if config.model.freeze is not None:
        frozen = sum(p.numel() for p in state.model.parameters() if not p.requires_grad)
        yield f"frozen       {config.model.freeze}: {frozen:,} parameters besides these"
        yield "frozen       BatchNorms are in evaluation mode"
    optimizer, schedule = config.optimizer, config.schedule
    yield f"optimizer    {optimizer.name}, lr {config.learning_rate:.3g}, weight decay {optimizer.weight_decay:g}"
    if optimizer.layer_decay is not None:
        yield f"optimizer    lr times {optimizer.layer_decay:g} per layer from the head"
    steps = schedule.warmup_steps
    warmup = schedule.warmup_epochs if steps is None else f"{steps} steps"
    yield f"schedule     {config.total_epochs} epochs x {steps_per_epoch} steps, lr set per {schedule.unit.value}"
    yield f"schedule     {warmup} warm-up, cosine over {config.epochs}, {schedule.cooldown_epochs} cool-down"
    yield f"run folder   {shlex.quote(str(config.resolved_run_dir))}"
    if (schedule.warmup_epochs * steps_per_epoch if steps is None else steps) >= config.epochs * steps_per_epoch:
        yield f"warning      the warm-up is as long as epochs={config.epochs}: the peak lr is never reached"


def _describe_macs(model: ModelConfig, images: Preprocessing, num_classes: int) -> str:
    """Return the multiply-accumulates of one image, counted on a copy without values; "" for other libraries."""
    if model.library is not Library.metaformer:
        return ""
    composition = model.composition
    own = composition is not None and composition.own_parts  # creating it computes an image, which needs values
    with torch.device("cpu" if own else "meta"), torch.random.fork_rng(devices=[]):
        network = create_model(composition or model.name, num_classes, image_size=images.image_size)
    try:
        return f", {count_complexity(network, images.image_size).macs / 1e9:.2f} GMACs"
    except RuntimeError as error:  # a part of the user's own may not run on torch's meta device
        return f", GMACs not counted ({one_line(error)[:100]})"


def _describe_parts(composition: Composition) -> str:
    values = asdict(composition).items()
    texts = (f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in values)
    return ", ".join(texts)
