"""Measure one variant of a training step or of inference once, for train.py, and print a JSON object."""

import argparse
import itertools
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import timm.optim
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from benchmarks.learner import CLASSES, make_learner
from metaformer.assembly import automatic_loader, make_loader
from metaformer.data.device import choice
from metaformer.data.device.choice import augment_by_triton, transform_by_triton
from metaformer.data.device.randaugment import apply_to_batch
from metaformer.data.device.transform import TrainingTransform, transform_plainly
from metaformer.data.feed import Feed, Placement
from metaformer.data.index.image_index import find_images
from metaformer.data.load.config import LoaderConfig
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import TrainingPlan
from metaformer.interfaces import Batch
from metaformer.models import create_model
from metaformer.models.fused import find_fault, fuse
from metaformer.models.variants import VARIANTS
from metaformer.program import keep_freed_memory, run_program
from metaformer.runtime import Runtime
from metaformer.training.config import PrecisionConfig, PrecisionName
from metaformer.training.precision import Precision
from metaformer.training.step import train_step

Step = Callable[[Iterator[Batch]], None]


def main() -> None:
    """Build the variant, run the uncounted steps, then the counted ones."""
    options = _parse()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_timm = options.variant.startswith("timm")
    if not is_timm and device.type == "cpu":
        keep_freed_memory()  # as train.py does
    model = _model(options, device)
    batches = (_timm_batches if is_timm else _batches)(options, device)
    step = _inference(model, options, device) if options.inference else _training(model, options, device, is_timm)
    seconds = [_timed(step, batches, device) for _ in range(options.uncounted)]
    first = seconds[0] if seconds else None
    seconds = [_timed(step, batches, device) for _ in range(options.steps)]
    if options.profile is not None:
        _profile(step, batches, options.profile)
    found = {"step_seconds": seconds, "images_per_second": options.steps * options.batch / sum(seconds)}
    print(json.dumps(found | {"first_step_seconds": first, "peak_memory_mib": _memory(device)}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", required=True, help="one of those of train.py")
    parser.add_argument("--model", required=True)
    for name in ("--size", "--batch", "--steps", "--uncounted", "--workers"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--precision", choices=[p.value for p in PrecisionName], required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--inference", action="store_true")
    return parser.parse_args()


def _model(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return the variant's network. It is channels_last, except for timm's on a CPU, which keeps timm's default."""
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
    """Raise an error if the fused kernels do not work, because the figure would be that of another variant."""
    if fault is not None:
        raise RuntimeError(f"the fused kernels: {fault}")


def _training(model: nn.Module, options: argparse.Namespace, device: torch.device, is_timm: bool) -> Step:
    """Return the training loop's step, or one as in timm's training program, with timm's loss and optimizer."""
    model.train()
    if not is_timm:
        learner = make_learner(model, Runtime(0, 1, 0, 1, device), options.precision)

        def step(batches: Iterator[Batch]) -> None:
            train_step(learner, batches)

        return step

    precision = Precision(PrecisionConfig(PrecisionName(options.precision)), device)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    compute_loss = SoftTargetCrossEntropy()

    def timm_step(batches: Iterator[Batch]) -> None:
        images, targets, _ = next(batches)
        with precision.autocast():
            logits = model(images)
        precision.scaler.scale(compute_loss(logits.float(), targets)).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return timm_step


def _inference(model: nn.Module, options: argparse.Namespace, device: torch.device) -> Step:
    precision = Precision(PrecisionConfig(PrecisionName(options.precision)), device)
    model.eval()

    def step(batches: Iterator[Batch]) -> None:
        images = next(batches).images
        with torch.inference_mode(), precision.autocast():
            model(images)

    return step


def _batches(options: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """Yield the recipe's batches from JPEGs, or a batch of noise that is mixed and erased again for each step."""
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
            yield Batch(*transform(pixels, labels, plan.batch(0, position)))
    index = find_images(options.data.absolute())
    plan = _plan(len(index), options)
    augment = apply_to_batch
    if device.type == "cuda":
        _refuse(choice.find_randaugment_fault(device, options.size))
        augment = augment_by_triton
    loader = make_loader(LoaderConfig(automatic_loader(device)), index, plan, device, options.workers, augment)
    feed = Feed(index, plan, loader, transform, Placement(device, torch.channels_last))
    for epoch in itertools.count():
        yield from feed.epoch(epoch)


def _plan(samples: int, options: argparse.Namespace) -> TrainingPlan:
    return TrainingPlan(
        num_samples=samples,
        global_batch_size=options.batch,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=0,
        image_size=options.size,
        crop_pct=0.9,
        augmentation=AugmentationConfig(),
    )


def _timm_batches(options: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """Yield the recipe's batches with timm's loader and mixing, or noise that is mixed and erased for each step."""
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
            yield Batch(mixed.contiguous(memory_format=layout), targets)
    loader = create_loader(
        ImageDataset(str(options.data)), (3, options.size, options.size), options.batch, is_training=True,
        use_prefetcher=device.type == "cuda", re_prob=0.25, re_mode="pixel", auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=None, interpolation="random", num_workers=options.workers, device=device,
    )  # fmt: skip
    while True:
        for images, labels in loader:
            mixed, targets = mixup(images.to(device), labels.to(device))
            yield Batch(mixed.contiguous(memory_format=layout), targets)


def _timed(step: Step, batches: Iterator[Batch], device: torch.device) -> float:
    """Return the seconds of one step, including the wait for its batch."""
    started = time.perf_counter()
    step(batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _profile(step: Step, batches: Iterator[Batch], folder: Path) -> None:
    """Write trace.json and operators.txt for one step."""
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile() as profiler:
        step(batches)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    (folder / "operators.txt").write_text(table)


def _memory(device: torch.device) -> float:
    """Return the peak in MiB of the GPU's allocated memory, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run_program(main)
