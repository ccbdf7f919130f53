"""Builds the parts that training and validation share: data, network and weights."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaformer.assembly.fusion import fuse_blocks
from metaformer.config import CommonConfig
from metaformer.data.device.randaugment import BatchAugmentation, apply_to_batch
from metaformer.data.device.transform import ColourStatistics, EvaluationTransform
from metaformer.data.feed import Feed, Placement, Transform
from metaformer.data.index.config import Source
from metaformer.data.index.files import check_split_folder
from metaformer.data.index.image_index import ImageIndex, check_several_classes, load_index
from metaformer.data.index.labels import relabel
from metaformer.data.index.quarantine import drop_quarantined
from metaformer.data.load.config import DecodeMode, LoaderConfig, LoaderName
from metaformer.data.load.dali_loader import DaliLoader, dali_is_installed
from metaformer.data.load.loader import Loader
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.load.reader import ImageReader
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.load.worker_server import start_worker_server
from metaformer.data.plan.plan import EvaluationPlan, Plan
from metaformer.data.prepare.sample import build_sample
from metaformer.errors import UserError
from metaformer.models import create_model, create_target_model, create_timm_model
from metaformer.models.config import Library, Preprocessing, ResizeFilter
from metaformer.models.download import download_weights, is_weights_name
from metaformer.runtime import Runtime
from metaformer.training.checkpoint import find_weights


class LocatedWeights(NamedTuple):
    """A weights file, and which set of weights in it to use."""

    name: str  # as shown in results
    path: Path
    use_ema: bool


def locate_weights(field: str, source: str, use_ema: bool) -> LocatedWeights:
    """Find the weights file for a released name, file, checkpoint folder or run folder; download released weights.

    Args:
        field: The configuration field or argument of `source`, for error messages.
    """
    if is_weights_name(source):
        return LocatedWeights(source, download_weights(source, field), use_ema)
    path = find_weights(field, Path(source), use_ema)
    return LocatedWeights(str(path), path, use_ema and path == Path(source))  # folders have a file for each set


def check_data_folder(config: CommonConfig, runtime: Runtime, split: str) -> None:
    """Raise an error if the folder of a split is missing, before weights are downloaded or a network is built."""
    if config.data.source is not Source.sample:
        runtime.main_only(lambda: check_split_folder(Path(config.data.root), split), None)


def open_index(config: CommonConfig, runtime: Runtime, split: str) -> ImageIndex:
    """Open a split of the data set and check that all ranks see the same one; build the sample data if missing."""
    root = Path(config.data.root)
    if config.data.source is Source.sample:
        runtime.main_only(lambda: None if root.exists() else build_sample(root), None)

    def load() -> ImageIndex:
        index = load_index(root, split, config.data.check)
        check_several_classes(index, config.data, split)
        return relabel(drop_quarantined(index, config.data, split), config.data)

    index = runtime.main_first(load)
    runtime.check_agreement(f"the data set in {root}", index.fingerprint)
    return index


class BuiltModel(NamedTuple):
    """A network on its device, and the status text of its fused operators."""

    model: nn.Module
    fused: str


def make_model(
    config: CommonConfig, images: Preprocessing, num_classes: int, runtime: Runtime, product_type: torch.dtype | None
) -> BuiltModel:
    """Build the network on the device, with the same initial weights on all ranks.

    Args:
        product_type: The dtype of matrix products under autocast, or None without autocast.
    """
    torch.manual_seed(config.seed)
    settings = config.model
    model: nn.Module
    if settings.library is Library.timm:
        model = create_timm_model(settings.name, num_classes, settings.drop_path_rate, images.image_size)
    elif settings.target is not None:
        model = create_target_model(settings.target, num_classes, settings.options, images.image_size)
    else:
        network = settings.composition or settings.name
        model = create_model(network, num_classes, settings.drop_path_rate, images.image_size, settings.head_dropout)
    fused = fuse_blocks(config, images, runtime, model, product_type)
    model = model.to(runtime.device, memory_format=memory_format(config))  # type: ignore[call-overload]
    if config.compile:
        model.compile()  # compiles in place at the first call, so state-dict keys stay and DDP can still wrap it
    return BuiltModel(model, fused)


def example_images(config: CommonConfig, images: Preprocessing, runtime: Runtime) -> Tensor:
    """Return a batch of two black images in the network's input format."""
    black = torch.zeros(2, 3, images.image_size, images.image_size, device=runtime.device)
    return black.contiguous(memory_format=memory_format(config))


def colour_statistics(images: Preprocessing) -> ColourStatistics:
    """Return the channel means and standard deviations that the network expects."""
    return ColourStatistics(images.mean, images.std)


def memory_format(config: CommonConfig) -> torch.memory_format:
    """Return the memory format of images and activations."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def prepare_workers(config: CommonConfig, runtime: Runtime) -> None:
    """Start the server of worker processes, which takes seconds, while this process builds the network."""
    if loader_name(config, runtime) is not LoaderName.dali and worker_count(config, runtime):
        start_worker_server()


def make_feed(
    config: CommonConfig,
    runtime: Runtime,
    index: ImageIndex,
    plan: Plan,
    transform: Transform,
    augment: BatchAugmentation = apply_to_batch,
) -> Feed:
    """Build a feed of a plan's batches, read by the configured loader; DALI's images are augmented with `augment`."""
    settings = dataclasses.replace(config.loader, name=loader_name(config, runtime))
    loader = make_loader(settings, index, plan, runtime.device, worker_count(config, runtime), augment)
    return Feed(index, plan, loader, transform, Placement(runtime.device, memory_format(config)))


def worker_count(config: CommonConfig, runtime: Runtime) -> int:
    """Return the number of loader processes or threads per rank."""
    return runtime.cpus_per_rank() if config.workers is None else config.workers


def make_loader(
    config: LoaderConfig,
    index: ImageIndex,
    plan: Plan,
    device: torch.device,
    workers: int,
    augment: BatchAugmentation = apply_to_batch,
) -> Loader:
    """Build the loader that `config.name` selects (not `auto`), with `workers` processes or threads."""
    if config.name is LoaderName.dali:
        loader = DaliLoader(index, plan, config, device, max(1, workers), augment)
        if device.type == "cuda" and config.check_decoding:
            loader.check_decoding()
        return loader
    reader = make_reader(config)
    return WorkerLoader(reader, index, plan, workers, config.prefetch_batches, pin_memory=device.type == "cuda")


def make_reader(config: LoaderConfig) -> ImageReader[Any]:
    """Return the image reader for worker processes: PIL's if it is configured, else torch's."""
    if config.name is LoaderName.pil:
        return PilReader(config.max_pixels)
    return TorchReader(config.max_pixels, scaled=config.decode is DecodeMode.scaled)


def loader_name(config: CommonConfig, runtime: Runtime) -> LoaderName:
    """Return the name of the configured loader, with `auto` resolved."""
    name = automatic_loader(runtime.device) if config.loader.name is LoaderName.auto else config.loader.name
    if config.loader.decode is DecodeMode.scaled and name is not LoaderName.torch:
        raise UserError(f"loader.decode=scaled: loader={name.value} decodes exactly; use loader=torch, or leave it out")
    return name


def automatic_loader(device: torch.device) -> LoaderName:
    """Return the loader that `auto` selects for a device."""
    return LoaderName.dali if device.type == "cuda" and dali_is_installed() else LoaderName.torch


def evaluation_feed(config: CommonConfig, images: Preprocessing, runtime: Runtime, index: ImageIndex) -> Feed:
    """Build a feed of this rank's share of the images, each exactly once."""
    share = {"rank": runtime.rank, "world_size": runtime.world_size}
    plan = evaluation_plan(images, num_samples=len(index), batch_size=config.eval_batch_size, **share)
    return make_feed(config, runtime, index, plan, EvaluationTransform(colour_statistics(images)))


def evaluation_plan(
    images: Preprocessing, *, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> EvaluationPlan:
    """Return the plan of a rank's share of the images, each exactly once, with this preprocessing."""
    return EvaluationPlan(
        num_samples=num_samples,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        image_size=images.image_size,
        crop_pct=images.crop_pct,
        bicubic=images.interpolation is ResizeFilter.bicubic,
    )
