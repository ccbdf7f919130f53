"""What both programs are built of: data, network, weights."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaformer.assembly.fusion import fuse_blocks
from metaformer.config import CommonConfig
from metaformer.data.device.transform import ColourStatistics, EvaluationTransform
from metaformer.data.feed import Feed, Placement, Transform
from metaformer.data.index.config import Source
from metaformer.data.index.image_index import ImageIndex, check_several_classes, load_index
from metaformer.data.index.labels import relabel
from metaformer.data.index.quarantine import drop_quarantined
from metaformer.data.load.config import Loader, LoaderConfig, LoaderName
from metaformer.data.load.dali_loader import DaliLoader, dali_is_installed
from metaformer.data.load.pil_reader import read_with_pil
from metaformer.data.load.torch_reader import read_with_torch
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.load.worker_server import start_worker_server
from metaformer.data.plan.plan import EvaluationPlan, Plan
from metaformer.data.prepare.sample import build_sample
from metaformer.models import create_model, create_timm_model
from metaformer.models.config import Library, ResizeFilter
from metaformer.models.download import download_weights, is_weights_name
from metaformer.models.preprocessing import Preprocessing
from metaformer.runtime import Runtime
from metaformer.training.checkpoint import find_weights


class LocatedWeights(NamedTuple):
    """A file of weights, and which of the sets in it are meant."""

    name: str  # for results
    path: Path
    use_ema: bool


def locate_weights(field: str, given: str, use_ema: bool) -> LocatedWeights:
    """The file behind a name, a path, a checkpoint folder or a run folder; what a name means is downloaded.

    Args:
        field: what the user gave it as, for errors.

    Raises:
        UserError: there is none.
    """
    if is_weights_name(given):
        return LocatedWeights(given, download_weights(given, field), use_ema)
    path = find_weights(field, Path(given), use_ema)
    return LocatedWeights(str(path), path, use_ema and path == Path(given))  # folders have a file for each set


def open_index(config: CommonConfig, runtime: Runtime, split: str) -> ImageIndex:
    """One split of the data set, the same on all ranks; the sample is built if it is not there.

    Raises:
        UserError: the folder is missing or no data set, data.quarantine does not fit it, or ranks see another one.
    """
    root = Path(config.data.root)
    if config.data.source is Source.sample:
        runtime.main_only(lambda: None if root.exists() else build_sample(root), None)

    def load() -> ImageIndex:
        found = load_index(root, split, config.data.check)
        check_several_classes(found, config.data, split)
        return relabel(drop_quarantined(found, config.data, split), config.data)

    index = runtime.main_first(load)
    runtime.check_agreement(f"the data set in {root}", index.fingerprint)
    return index


class BuiltModel(NamedTuple):
    """A network on its device, and what it uses of the fused operators, for people."""

    model: nn.Module
    fused: str


def make_model(
    config: CommonConfig, images: Preprocessing, num_classes: int, runtime: Runtime, product_type: torch.dtype | None
) -> BuiltModel:
    """The network on the device; equal on all ranks, because all start from the seed.

    Args:
        product_type: of matrix products under autocast; None without.
    """
    torch.manual_seed(config.seed)
    named = config.model
    model: nn.Module
    if named.library is Library.timm:
        model = create_timm_model(named.name, num_classes, named.drop_path_rate, images.image_size)
    else:
        network = named.composition or named.name
        model = create_model(network, num_classes, named.drop_path_rate, images.image_size, named.head_dropout)
    fused = fuse_blocks(config, images, runtime, model, product_type)
    model = model.to(runtime.device, memory_format=memory_format(config))  # type: ignore[call-overload]
    if config.compile:
        model.compile()  # in place, at the first call: the state dict keeps its keys, and DDP may still wrap it
    return BuiltModel(model, fused)


def example_images(config: CommonConfig, images: Preprocessing, runtime: Runtime) -> Tensor:
    """Two black images, as the network takes them."""
    black = torch.zeros(2, 3, images.image_size, images.image_size, device=runtime.device)
    return black.contiguous(memory_format=memory_format(config))


def colours(images: Preprocessing) -> ColourStatistics:
    """The mean and deviation that the network expects."""
    return ColourStatistics(images.mean, images.std)


def memory_format(config: CommonConfig) -> torch.memory_format:
    """How images and activations lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def prepare_workers(config: CommonConfig, runtime: Runtime) -> None:
    """Let the server of worker processes start, which takes seconds, while this process makes the network."""
    if loader_name(config, runtime) is not LoaderName.dali and worker_count(config, runtime):
        start_worker_server(preload=[__package__])  # with all that a worker imports when it imports the main program


def make_feed(config: CommonConfig, runtime: Runtime, index: ImageIndex, plan: Plan, transform: Transform) -> Feed:
    """A plan's batches, read by the configured loader."""
    settings = dataclasses.replace(config.loader, name=loader_name(config, runtime))
    loader = make_loader(settings, index, plan, runtime.device, worker_count(config, runtime))
    return Feed(index, plan, loader, transform, Placement(runtime.device, memory_format(config)))


def worker_count(config: CommonConfig, runtime: Runtime) -> int:
    """A loader's processes or threads."""
    return runtime.cpus_per_rank() if config.workers is None else config.workers


def make_loader(config: LoaderConfig, index: ImageIndex, plan: Plan, device: torch.device, workers: int) -> Loader:
    """The loader of that name (not `auto`), with `workers` processes or threads."""
    if config.name is LoaderName.dali:
        return DaliLoader(index, plan, config, device, max(1, workers))
    read = read_with_torch if config.name is LoaderName.torch else read_with_pil
    read = partial(read, max_pixels=config.max_pixels)
    return WorkerLoader(read, index, plan, workers, config.prefetch_batches, pin_memory=device.type == "cuda")


def loader_name(config: CommonConfig, runtime: Runtime) -> LoaderName:
    """The loader that is meant, `auto` resolved."""
    return automatic_loader(runtime.device) if config.loader.name is LoaderName.auto else config.loader.name


def automatic_loader(device: torch.device) -> LoaderName:
    """What `auto` means where the training runs on this device."""
    return LoaderName.dali if device.type == "cuda" and dali_is_installed() else LoaderName.torch


def evaluation_feed(config: CommonConfig, images: Preprocessing, runtime: Runtime, index: ImageIndex) -> Feed:
    """This rank's share of the images, each once."""
    plan = EvaluationPlan(
        num_samples=len(index),
        batch_size=config.eval_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        image_size=images.image_size,
        crop_pct=images.crop_pct,
        bicubic=images.interpolation is ResizeFilter.bicubic,
    )
    return make_feed(config, runtime, index, plan, EvaluationTransform(colours(images)))
