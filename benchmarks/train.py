"""Measure the speed of training or inference of a network, next to timm's network and the device's roofline.

  python -m benchmarks.train --model poolformer_s12 --size 128 --batch 32 --precision fp32
  python -m benchmarks.train --data /path/to/imagenet/train --only eager timm-eager --json found.json

The variants are fused and fused-compiled (this project's operators, on GPUs), eager and compiled (its plain network),
and timm-eager and timm-compiled (timm's network with timm's loss, mixing and optimizer). Each measurement runs in a
separate process (measure_train.py), and the variants alternate. Without --data, the images are noise on the device.

images/s and step are those of the fastest quartile of all counted steps, including the wait for the batch. Next to them
are the lowest and the highest mean of a repeat. A loaded machine is refused; --loaded reports its figures and marks
them. The load is observed for a second before each measurement. Memory: peak of the GPU's allocated memory or, on a
CPU, of the process's resident memory. TFLOP/s count the convolutions and matrix products of the plain network, three
times for training. The roofline is the longer of two times: that of these operations at the rate of a large square
product, computed as a matrix product or as a 1x1 convolution, whichever is faster, and that of moving the bytes of the
fused operators (docs/performance.md) at the rate of a large copy."""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import (
    LOADED,
    as_options,
    by_turns,
    check_counts,
    check_load,
    check_outputs,
    console,
    measure,
    write_json,
)
from metaformer.errors import UserError, unknown_name
from metaformer.models import create_model
from metaformer.models.metaformer import MetaFormerBlock
from metaformer.program import run_program

VARIANTS = ("fused", "fused-compiled", "eager", "compiled", "timm-eager", "timm-compiled")
NUMBERS = ("size", "batch", "steps", "uncounted", "repeats")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Measure, print the table, and write the figures and the plot."""
    arguments = _parse()
    variants = _select(arguments.only)
    found = by_turns(variants, arguments.repeats, lambda variant, repeat: _measure(variant, arguments, repeat == 0))
    work = count_work(arguments.model, arguments.size, arguments.precision, arguments.inference)
    roof = _roofline(work, arguments)
    rows = {variant: _summary(values, work, arguments.batch) for variant, values in found.items()}
    _print(rows, roof, arguments)
    settings = {name: getattr(arguments, name) for name in ("model", "precision", "inference", *NUMBERS)}
    write_json(arguments.json, {**settings, "roofline": roof, "variants": rows})
    if arguments.plot is not None:
        _plot(rows, roof, arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="poolformer_s12")
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=TYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a measurement")
    parser.add_argument("--uncounted", type=int, default=3, help="steps before them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the loader")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a folder with class folders of images")
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--loaded", action="store_true", help="report figures of a loaded machine, too, marked as such")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG to FILE")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a trace and the top operators to FOLDER")
    arguments = parser.parse_args()
    check_counts(arguments, *NUMBERS)
    if arguments.batch % 2:
        raise UserError(f"--batch={arguments.batch}: mixing needs an even size")
    if not timm.is_model(arguments.model):
        raise unknown_name("--model", arguments.model, timm.list_models("poolformer_*"))
    check_outputs(arguments, "json", "plot")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: matplotlib is not installed; `uv pip install matplotlib`")
    return arguments


def _select(only: list[str] | None) -> list[str]:
    possible = [name for name in VARIANTS if torch.cuda.is_available() or not name.startswith("fused")]
    for name in only or ():
        if name not in VARIANTS:
            raise unknown_name("--only", name, VARIANTS)
        if name not in possible:
            raise UserError(f"--only={name}: needs a GPU; on a CPU, leave it out")
    return [name for name in possible if only is None or name in only]


def _measure(variant: str, arguments: argparse.Namespace, profiled: bool) -> dict[str, Any]:
    options = [f"--variant={variant}"]
    options += as_options(arguments, "model", "size", "batch", "precision", "steps", "uncounted", "workers")
    options += [f"--data={arguments.data.absolute()}"] if arguments.data is not None else []
    options += ["--inference"] if arguments.inference else []
    if arguments.profile is not None and profiled:
        folder = (arguments.profile / variant).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        options.append(f"--profile={folder}")
    load = check_load(anyway=arguments.loaded)
    return measure(variant, "measure_train", options) | {"load": load}


def count_work(name: str, size: int, precision: str, inference: bool) -> dict[str, float]:
    """Return the FLOPs of the plain network's products and the bytes of the fused operators' passes, for one image.

    For each element of its input, a block moves 15 float32 elements of the residual stream and 59 elements of the
    products' type; in inference, 5 and 20. The stem, downsampling and head are not counted.
    """
    model = create_model(name).eval()
    elements = []

    def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        elements.append(inputs[0].numel())

    for module in model.modules():
        if isinstance(module, MetaFormerBlock):
            module.register_forward_pre_hook(note)
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter, torch.no_grad():
        model.to("meta")(torch.empty(1, 3, size, size))
    stream, products = (5, 20) if inference else (15, 59)
    bytes_per_element = stream * 4 + products * TYPES[precision].itemsize
    flops = counter.get_total_flops() * (1 if inference else 3)
    return {"flops": float(flops), "bytes": float(sum(elements) * bytes_per_element)}


def _roofline(work: dict[str, float], arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the device's peak rates, and return them with the images per second that they allow."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    square = torch.randn(side, side, device=device).to(TYPES[arguments.precision])
    images, weight = square.view(-1, 8, 8, side).permute(0, 3, 1, 2), square[:, :, None, None]
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    product = min(_fastest(lambda: square @ square), _fastest(lambda: functional.conv2d(images, weight)))
    flops = 2 * side**3 / product
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    seconds = {"compute": work["flops"] / flops, "memory": work["bytes"] / bandwidth}
    limits = {f"{name}_images_per_second": 1 / value for name, value in seconds.items()}
    return {"flops_per_second": flops, "bytes_per_second": bandwidth, **limits}


def _fastest(run: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of ten runs."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _summary(values: list[dict[str, Any]], work: dict[str, float], batch: int) -> dict[str, Any]:
    step = float(np.quantile([seconds for v in values for seconds in v["step_seconds"]], 0.25))
    means = [v["images_per_second"] for v in values]
    return {
        "images_per_second": {"fastest_quartile": batch / step, "min": min(means), "max": max(means)},
        "step_seconds": step,
        "load": max(v["load"] for v in values),
        "first_step_seconds": statistics.median(v["first_step_seconds"] for v in values),
        "peak_memory_mib": max(v["peak_memory_mib"] for v in values),
        "tflops_per_second": work["flops"] * batch / step / 1e12,
        "fused_gb_per_second": work["bytes"] * batch / step / 1e9,
    }


def _print(rows: dict[str, dict[str, Any]], roof: dict[str, float], arguments: argparse.Namespace) -> None:
    reference = rows.get("timm-eager", {}).get("images_per_second", {}).get("fastest_quartile")
    columns = ("images/s", "means of repeats", "of timm-eager", "step ms", "first s", "memory MiB", "TFLOP/s", "GB/s")
    table = Table("variant", *columns, title=_title(rows, arguments))
    for variant, row in rows.items():
        speed = row["images_per_second"]
        ratio = f"{speed['fastest_quartile'] / reference:.2f}" if reference else "-"
        times = (f"{1000 * row['step_seconds']:.0f}", f"{row['first_step_seconds']:.1f}")
        rates = (f"{row['tflops_per_second']:.3f}", f"{row['fused_gb_per_second']:.1f}")
        speeds = (f"{speed['fastest_quartile']:.1f}", f"{speed['min']:.1f} to {speed['max']:.1f}", ratio)
        table.add_row(variant, *speeds, *times, f"{row['peak_memory_mib']:.0f}", *rates)
    out = console()
    out.print(table)
    out.print(
        f"roofline: {roof['compute_images_per_second']:.0f} images/s by products, "
        f"{roof['memory_images_per_second']:.0f} by memory"
    )


def _title(rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    what = "inference" if arguments.inference else "training"
    load = max(row["load"] for row in rows.values())
    mark = f", LOADED MACHINE ({load:.0%} in use by others)" if load >= LOADED else ""
    return f"{arguments.model}, {what}, {arguments.size} px, batch {arguments.batch}, {arguments.precision}{mark}"


def _plot(rows: dict[str, dict[str, Any]], roof: dict[str, float], arguments: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    speeds = [row["images_per_second"]["fastest_quartile"] for row in rows.values()]
    limits = {name: roof[f"{name}_images_per_second"] for name in ("compute", "memory")}
    axes.bar_label(axes.bar(list(rows), speeds), fmt="%.1f")
    for (name, limit), style in zip(limits.items(), ("--", ":"), strict=True):
        axes.axhline(limit, color="black", linestyle=style, label=f"roofline, {name}: {limit:.0f}")
    top = 1.3 * max(*speeds, min(limits.values()))  # a limit far above all bars would leave no room for them
    axes.set(ylabel="images/s", ylim=(0, top), title=_title(rows, arguments))
    axes.legend(loc="upper right", ncols=2)
    figure.savefig(arguments.plot, dpi=120, format="png")


if __name__ == "__main__":
    run_program(main)
