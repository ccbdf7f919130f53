"""Measure one variant of a training step (or of inference), once; prints one JSON object.

`benchmark_train.py` runs this program for each of its measurements and says there what is measured.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import timm.optim
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from metaformer.assembly import automatic_loader, make_loader
from metaformer.data.device import choice
from metaformer.data.device.choice import transform_by_triton
from metaformer.data.device.transform import TrainingTransform, transform_plainly
from metaformer.data.feed import Feed, Placement
from metaformer.data.index.image_index import find_images
from metaformer.data.load.config import LoaderConfig
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import TrainingPlan
from metaformer.models import create_model
from metaformer.models.fused import find_fault, fuse
from metaformer.models.variants import VARIANTS
from metaformer.program import keep_freed_memory, run_program
from metaformer.training.optimizer import OptimizerConfig, make_optimizer
from metaformer.training.precision import Precision, PrecisionConfig, PrecisionName

CLASSES = 1000
Batches = Iterator[tuple[Tensor, Tensor]]


def main() -> None:
    """Make the variant, run its uncounted steps, then the counted ones."""
    options = _parse()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs = options.variant.startswith("timm")
    if not theirs and device.type == "cpu":
        keep_freed_memory()  # as train.py does
    model = _model(options, device)
    batches = (_timm_batches if theirs else _batches)(options, device)
    step = _inference(model, options, device) if options.inference else _training(model, options, device, theirs)
    seconds = [_timed(step, batches, device) for _ in range(options.uncounted)]
    first = seconds[0] if seconds else None
    seconds = [_timed(step, batches, device) for _ in range(options.steps)]
    if options.profile is not None:
        _profile(step, batches, options.profile)
    found = {"step_seconds": statistics.median(seconds), "first_step_seconds": first}
    found |= {"images_per_second": options.steps * options.batch / sum(seconds), "peak_memory_mib": _memory(device)}
    print(json.dumps(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, help="one of benchmark_train.py's")
    parser.add_argument("--model", required=True)
    for name in ("--size", "--batch", "--steps", "--uncounted", "--workers"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--precision", choices=[p.value for p in PrecisionName], required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--inference", action="store_true")
    return parser.parse_args()


def _model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """Ours with channels_last; timm's with it on a GPU only: on a CPU it trains with its default."""
    library, _, mode = options.variant.rpartition("-")
    model: nn.Module
    if library == "timm":
        rate = VARIANTS[options.model].drop_path_rate
        model = timm.create_model(options.model, num_classes=CLASSES, drop_path_rate=rate)
    else:
        model = ours = create_model(options.model, CLASSES)
    channels_last = device.type == "cuda" or library != "timm"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    if "fused" in options.variant:
        dtype = Precision(PrecisionConfig(PrecisionName(options.precision)), device).dtype
        _refuse(find_fault(ours, options.size, device, dtype))
        fuse(ours)
    if mode == "compiled":
        model.compile()
    return model


def _refuse(fault: str | None) -> None:
    """No figure is better than one of something else."""
    if fault is not None:
        raise RuntimeError(f"the fused kernels: {fault}")


def _training(
    model: nn.Module, options: argparse.Namespace, device: torch.device, theirs: bool
) -> Callable[[Tensor, Tensor], None]:
    """A step as in training/loop.py, or as in timm's training program: its loss and its way to make an optimizer."""
    precision = Precision(PrecisionConfig(PrecisionName(options.precision)), device)
    optimizer, loss_of = make_optimizer(OptimizerConfig(), model, 1e-3), functional.cross_entropy
    if theirs:
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
        loss_of = SoftTargetCrossEntropy()
    model.train()

    def step(images: Tensor, targets: Tensor) -> None:
        with precision.autocast():
            logits = model(images)
        loss = loss_of(logits.float(), targets)
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _inference(model: nn.Module, options: argparse.Namespace, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    precision = Precision(PrecisionConfig(PrecisionName(options.precision)), device)
    model.eval()

    def step(images: Tensor, _: Tensor) -> None:
        with torch.inference_mode(), precision.autocast():
            model(images)

    return step


def _batches(options: argparse.Namespace, device: torch.device) -> Batches:
    """The recipe's batches from JPEGs, or one batch of noise that is mixed and erased anew for each step."""
    transform_images = transform_plainly
    if device.type == "cuda":
        _refuse(choice.find_fault(device, options.size))
        transform_images = transform_by_triton
    transform = TrainingTransform(CLASSES, 0.1, transform_images=transform_images)
    if options.data is None:
        plan = _plan(options.batch * 1000, options)
        pixels = torch.randint(256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(options.batch, device=device) % CLASSES
        for position in itertools.count():
            yield transform(pixels, labels, plan.batch(0, position))
    index = find_images(options.data.absolute())
    plan = _plan(len(index), options)
    loader = make_loader(LoaderConfig(automatic_loader(device)), index, plan, device, options.workers)
    feed = Feed(index, plan, loader, transform, Placement(device, torch.channels_last))
    for epoch in itertools.count():
        yield from ((batch.images, batch.targets) for batch in feed.epoch(epoch))


def _plan(samples: int, options: argparse.Namespace) -> TrainingPlan:
    return TrainingPlan(samples, options.batch, 1, 0, 1, 0, options.size, 0.9, AugmentationConfig())


def _timm_batches(options: argparse.Namespace, device: torch.device) -> Batches:
    """The recipe's batches by timm's loader and mixing, or one batch of noise mixed and erased anew for each step."""
    from timm.data import ImageDataset, Mixup, create_loader
    from timm.data.random_erasing import RandomErasing

    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    if options.data is None:
        images = torch.randn(options.batch, 3, options.size, options.size, device=device)
        labels = torch.arange(options.batch, device=device) % CLASSES
        erase = RandomErasing(0.25, mode="pixel", device=device)
        while True:
            mixed, targets = mixup(erase(images.clone()), labels)
            yield mixed.contiguous(memory_format=layout), targets
    loader = create_loader(
        ImageDataset(str(options.data)), (3, options.size, options.size), options.batch, is_training=True,
        use_prefetcher=device.type == "cuda", re_prob=0.25, re_mode="pixel", auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=None, interpolation="random", num_workers=options.workers, device=device,
    )  # fmt: skip
    while True:
        for images, labels in loader:
            mixed, targets = mixup(images.to(device), labels.to(device))
            yield mixed.contiguous(memory_format=layout), targets


def _timed(step: Callable[[Tensor, Tensor], None], batches: Batches, device: torch.device) -> float:
    """Seconds of one step, the wait for its batch included."""
    started = time.perf_counter()
    step(*next(batches))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _profile(step: Callable[[Tensor, Tensor], None], batches: Batches, folder: Path) -> None:
    """Write trace.json and operators.txt, of one step."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile() as profiler:
        step(*next(batches))
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    (folder / "operators.txt").write_text(table)


def _memory(device: torch.device) -> float:
    """The most that was held: of the GPU's memory, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run_program(main)
