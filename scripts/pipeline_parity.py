"""Compare each loader's images with PIL's, and the network's predictions for them, on any folder of images.

  python scripts/pipeline_parity.py /path/to/imagenet/val
  python scripts/pipeline_parity.py /path/to/imagenet/val --model poolformer_m36 --checkpoint official:poolformer_m36

Pixels are compared as the loaders return them, in uint8, for evaluation and for training with the same crops and
operations. --checkpoint adds logits and predictions, and top-1 if the folder has as many classes as the network.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from metaformer.assembly import make_loader
from metaformer.data.device.transform import normalize
from metaformer.data.index.image_index import ImageIndex, find_images
from metaformer.data.load.config import LoaderConfig, LoaderName
from metaformer.data.load.dali_loader import dali_is_installed
from metaformer.data.plan.augmentation import AugmentationConfig, RandAugmentConfig
from metaformer.data.plan.plan import EvaluationPlan, Plan, TrainingPlan
from metaformer.errors import UserError
from metaformer.models import create_model, list_models, load_weights
from metaformer.models.preprocessing import paper_preprocessing
from metaformer.program import run_program

BATCH = 16


class LoaderComparison(NamedTuple):
    """Pixels and logits of a loader and of PIL for one plan."""

    pixel_difference: Tensor  # float32 [N], mean absolute difference of each image on the scale of 0 to 255
    logits: Tensor  # float32 [N, C], or [N, 0] without a network
    reference_logits: Tensor


def main() -> None:
    """Print a table of pixel differences and, with a checkpoint, one of predictions."""
    arguments = _parse()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    index = _select_evenly(find_images(arguments.folder), arguments.images)
    network = None if arguments.checkpoint is None else _load_network(arguments, device)
    names = [LoaderName.torch] + ([LoaderName.dali] if dali_is_installed() else [])
    print(f"{len(index)} images of {arguments.folder}, {arguments.image_size} px, {device.type}; differences from PIL")
    if LoaderName.dali not in names:
        print("nvidia-dali is not installed: only torch is compared")
    pixels = Table("images", "loader", "mean, of 255", "worst image")
    for title, plan in _plans(len(index), arguments.image_size).items():
        for name in names:
            difference = _compare(name, index, plan, device, None).pixel_difference
            pixels.add_row(title, name.value, f"{difference.mean():.3f}", f"{difference.max():.3f}")
    console = Console()
    console.print(pixels)
    if network is not None:
        console.print(_predictions(arguments, network, index, names))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images, in class folders or not")
    parser.add_argument("--images", type=int, default=256, help="number of images, spread over the folder (256)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--model", choices=list_models(), default="poolformer_s12", metavar="NAME")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--checkpoint", help="weights: a file or a name, as for validate.py")
    arguments = parser.parse_args()
    if arguments.image_size < 32:
        raise UserError(f"--image-size={arguments.image_size}: the networks reduce an image 32-fold; use 32 or more")
    return arguments


def _load_network(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    network = create_model(arguments.model, arguments.num_classes, image_size=arguments.image_size)
    load_weights(network, arguments.checkpoint)
    return network.to(device).eval()


def _select_evenly(index: ImageIndex, count: int) -> ImageIndex:
    """Select about `count` images, evenly spread over the index."""
    if count < 1:
        raise UserError(f"--images={count}: must be at least 1")
    return index.select(np.unique(np.linspace(0, len(index) - 1, count).astype(np.int64)))


def _plans(count: int, size: int) -> dict[str, Plan]:
    def training(augmentation: AugmentationConfig) -> Plan:
        return TrainingPlan(
            num_samples=count,
            global_batch_size=min(BATCH, count),
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=0,
            image_size=size,
            crop_pct=0.9,
            augmentation=augmentation,
        )

    return {
        "evaluation, crop .9 (S)": _evaluation(count, size, 0.9),
        "evaluation, crop .95 (M)": _evaluation(count, size, 0.95),
        "training, crop and flip": training(AugmentationConfig(randaugment=RandAugmentConfig(num_ops=0))),
        "training, RandAugment": training(AugmentationConfig()),
    }


def _evaluation(count: int, size: int, crop_pct: float) -> Plan:
    return EvaluationPlan(num_samples=count, batch_size=BATCH, rank=0, world_size=1, image_size=size, crop_pct=crop_pct)


def _batches(name: LoaderName, index: ImageIndex, plan: Plan, device: torch.device) -> Iterator[Tensor]:
    with closing(make_loader(LoaderConfig(name), index, plan, device, workers=2)) as loader:
        for batch in loader.epoch(0):
            yield batch.to(device)


@torch.inference_mode()
def _compare(
    name: LoaderName, index: ImageIndex, plan: Plan, device: torch.device, network: nn.Module | None
) -> LoaderComparison:
    parts = []
    pairs = (_batches(loader, index, plan, device) for loader in (name, LoaderName.pil))
    for images, reference in zip(*pairs, strict=True):
        pixels = (images.float() - reference.float()).abs().mean((1, 2, 3)).cpu()
        both = [network(normalize(x)).cpu() if network else torch.empty(len(x), 0) for x in (images, reference)]
        parts.append((pixels, *both))
    return LoaderComparison(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _predictions(
    arguments: argparse.Namespace, network: nn.Module, index: ImageIndex, names: list[LoaderName]
) -> Table:
    device = next(network.parameters()).device
    crop_pct = paper_preprocessing(arguments.model).crop_pct
    labels = torch.from_numpy(index.labels) if len(index.classes) == arguments.num_classes else None

    def top1(logits: Tensor) -> str:
        return "no labels" if labels is None else f"{100 * (logits.argmax(1) == labels).float().mean():.2f}"

    table = Table(f"{arguments.model}, crop {crop_pct:g}", "logits, mean", "logits, max", "same prediction", "top-1")
    for name in names:
        plan = _evaluation(len(index), arguments.image_size, crop_pct)
        comparison = _compare(name, index, plan, device, network)
        difference = (comparison.logits - comparison.reference_logits).abs()
        same = 100 * (comparison.logits.argmax(1) == comparison.reference_logits.argmax(1)).float().mean()
        cells = (f"{difference.mean():.4f}", f"{difference.max():.4f}", f"{same:.2f} %", top1(comparison.logits))
        table.add_row(name.value, *cells)
    table.add_row("pil", "0", "0", "100 %", top1(comparison.reference_logits))
    return table


if __name__ == "__main__":
    run_program(main)
