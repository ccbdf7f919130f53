"""Human-readable lines about a run: its settings, and advice for faster loading."""

import shlex
from collections.abc import Iterator

import torch

from metaformer.assembly.parts import loader_name, worker_count
from metaformer.assembly.splits import Splits
from metaformer.config import TrainConfig
from metaformer.data.load.config import LoaderName
from metaformer.models.preprocessing import Preprocessing
from metaformer.numa import describe_cpus
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
    parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    rank_batch = config.rank_batch_size(runtime.world_size)
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
    yield f"model        {config.model.name}, {parameters:,} parameters, {splits.num_classes} classes"
    root, train, val = splits.train.folder.parent, len(splits.train), len(splits.val)
    note = f"; {splits.train.quarantined:,} and {splits.val.quarantined:,} are excluded by {config.data.quarantine}"
    yield f"data         {root}: {train:,} training, {val:,} validation images{note if config.data.quarantine else ''}"
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
    optimizer, schedule = config.optimizer, config.schedule
    yield f"optimizer    {optimizer.name}, lr {config.learning_rate:.3g}, weight decay {optimizer.weight_decay:g}"
    yield (
        f"schedule     {config.total_epochs} epochs x {steps_per_epoch} steps: {schedule.warmup_epochs} warm-up, "
        f"cosine over {config.epochs}, {schedule.cooldown_epochs} cool-down, per {schedule.unit.value}"
    )
    yield f"run folder   {shlex.quote(str(config.resolved_run_dir))}"
    if schedule.warmup_epochs >= config.epochs:
        yield f"warning      the warm-up is as long as epochs={config.epochs}: the peak lr is never reached"


def loading_advice(config: TrainConfig, runtime: Runtime) -> str:
    """Return advice for faster loading, with the current settings."""
    workers = worker_count(config, runtime)
    if loader_name(config, runtime) is LoaderName.dali:
        return f"raise workers (now {workers}) or loader.prefetch_batches (now {config.loader.prefetch_batches})"
    faster = "loader=dali" if runtime.device.type == "cuda" else "loader=torch"
    other = "" if loader_name(config, runtime).value in faster else f", or use {faster}"
    return f"raise workers (now {workers}, {runtime.cpus_per_rank()} CPU cores){other}"
