"""How fast a network trains (or infers), beside timm's network of the same name and the device's roofline.

  python scripts/benchmark_train.py --model poolformer_s12 --size 128 --batch 32 --precision fp32
  python scripts/benchmark_train.py --data /path/to/imagenet/train --only fused timm-eager --json found.json

Variants: fused and fused-compiled (this project's operators), eager and compiled (its plain network), timm-eager and
timm-compiled (timm's network, with its loss, mixing and optimizer). Each measurement runs in a process of its own
(measure_train.py), repeat r of all before repeat r + 1. Without --data the images are noise that lies on the device.

Step: median over the counted steps, the wait for the batch included. Memory: of the GPU, the most that was allocated;
without one, of the process, the most that was resident. TFLOP/s count the convolutions and matrix products of the plain
network, threefold for training. The roofline is the time that they take at the rate of a large square product, and the
time to move the bytes of the fused operators (docs/performance.md) at the rate of a large copy: the longer one bounds.
"""

import argparse
import importlib.util
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from metaformer.errors import UserError, unknown_name
from metaformer.files import check_output, write_text_atomically
from metaformer.models import create_model
from metaformer.models.metaformer import MetaFormerBlock
from metaformer.program import run_program

VARIANTS = ("fused", "fused-compiled", "eager", "compiled", "timm-eager", "timm-compiled")
NUMBERS = ("size", "batch", "steps", "uncounted", "repeats")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Measure, print the table, and write the figures and the plot."""
    arguments = _parse()
    variants = _chosen(arguments.only)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for repeat, variant in itertools.product(range(arguments.repeats), variants):
        found[variant].append(_measure(variant, arguments, profiled=repeat == 0))
        done = f"repeat {repeat + 1} of {arguments.repeats}, {variant}"
        print(f"{done}: {found[variant][-1]['images_per_second']:.1f} images/s", file=sys.stderr, flush=True)
    work = count_work(arguments.model, arguments.size, arguments.precision, arguments.inference)
    roof = _roofline(work, arguments)
    rows = {variant: _summary(values, work, arguments.batch) for variant, values in found.items()}
    _print(rows, roof, arguments)
    if arguments.json is not None:
        settings = {name: getattr(arguments, name) for name in ("model", "precision", "inference", *NUMBERS)}
        outcome = {**_circumstances(), **settings, "roofline": roof, "variants": rows}
        write_text_atomically(arguments.json, json.dumps(outcome, indent=2) + "\n")
    if arguments.plot is not None:
        _plot(rows, roof, arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="poolformer_s12")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=TYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=10, help="counted in each measurement")
    parser.add_argument("--uncounted", type=int, default=3, help="steps before them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="of the loader")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="holds class folders of images")
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG there")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write a trace and the top operators there")
    arguments = parser.parse_args()
    for name in NUMBERS:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)}: must be at least 1")
    if arguments.batch % 2:
        raise UserError(f"--batch={arguments.batch}: mixing needs an even size")
    if not timm.is_model(arguments.model):
        raise unknown_name("--model", arguments.model, timm.list_models("poolformer_*"))
    for option in ("json", "plot"):
        file: Path | None = getattr(arguments, option)
        if file is not None:
            check_output(f"--{option}={file}", file)
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: matplotlib is not installed; `uv pip install matplotlib`")
    return arguments


def _chosen(only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in VARIANTS:
            raise unknown_name("--only", name, VARIANTS)
    return [name for name in VARIANTS if only is None or name in only]


def _measure(variant: str, arguments: argparse.Namespace, profiled: bool) -> dict[str, float]:
    """One measurement, in a new process."""
    command = [sys.executable, str(Path(__file__).with_name("measure_train.py")), f"--variant={variant}"]
    for name in ("model", "size", "batch", "precision", "steps", "uncounted", "workers"):
        command.append(f"--{name}={getattr(arguments, name)}")
    command += [f"--data={arguments.data.absolute()}"] if arguments.data is not None else []
    command += ["--inference"] if arguments.inference else []
    if arguments.profile is not None and profiled:
        folder = (arguments.profile / variant).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        command.append(f"--profile={folder}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "nothing on stderr").splitlines()[-1].removeprefix("error: ")
        raise UserError(f"{variant}: its process ended with exit code {done.returncode}: {last}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def count_work(name: str, size: int, precision: str, inference: bool) -> dict[str, float]:
    """FLOPs and bytes of one image: the plain network's products, and the passes of the fused operators.

    A block's passes move 15 elements of the stream (float32) and 59 of the products' type for each element of its
    input, 5 and 20 of them in inference; stem, downsampling and head are not counted.
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
    each = stream * 4 + products * TYPES[precision].itemsize
    flops = counter.get_total_flops() * (1 if inference else 3)
    return {"flops": float(flops), "bytes": float(sum(elements) * each)}


def _roofline(work: dict[str, float], arguments: argparse.Namespace) -> dict[str, float]:
    """The device's measured rates, and the images a second that they allow."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    square = torch.randn(side, side, device=device).to(TYPES[arguments.precision])
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    flops = 2 * side**3 / _fastest(lambda: square @ square)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    seconds = {"compute": work["flops"] / flops, "memory": work["bytes"] / bandwidth}
    limits = {f"{name}_images_per_second": 1 / value for name, value in seconds.items()}
    return {"flops_per_second": flops, "bytes_per_second": bandwidth, **limits}


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of ten."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _summary(values: list[dict[str, float]], work: dict[str, float], batch: int) -> dict[str, Any]:
    speeds, step = [v["images_per_second"] for v in values], statistics.median(v["step_seconds"] for v in values)
    return {
        "images_per_second": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)},
        "step_seconds": step,
        "first_step_seconds": statistics.median(v["first_step_seconds"] for v in values),
        "peak_memory_mib": max(v["peak_memory_mib"] for v in values),
        "tflops_per_second": work["flops"] * batch / step / 1e12,
        "fused_gb_per_second": work["bytes"] * batch / step / 1e9,
    }


def _print(rows: dict[str, dict[str, Any]], roof: dict[str, float], arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    base = rows.get("timm-eager", {}).get("images_per_second", {}).get("median")
    columns = ("images/s", "lowest to highest", "of timm-eager", "step ms", "first s", "memory MiB", "TFLOP/s", "GB/s")
    table = Table("variant", *columns, title=_title(arguments))
    for variant, row in rows.items():
        speed = row["images_per_second"]
        spread, ratio = f"{speed['min']:.1f} to {speed['max']:.1f}", f"{speed['median'] / base:.2f}" if base else "-"
        times = (f"{1000 * row['step_seconds']:.0f}", f"{row['first_step_seconds']:.1f}")
        rates = (f"{row['tflops_per_second']:.3f}", f"{row['fused_gb_per_second']:.1f}")
        table.add_row(variant, f"{speed['median']:.1f}", spread, ratio, *times, f"{row['peak_memory_mib']:.0f}", *rates)
    console.print(table)
    console.print(
        f"roofline: {roof['compute_images_per_second']:.0f} images/s by products, "
        f"{roof['memory_images_per_second']:.0f} by memory"
    )


def _title(arguments: argparse.Namespace) -> str:
    """What is measured, over the table and the plot."""
    what = "inference" if arguments.inference else "training"
    return f"{arguments.model}, {what}, {arguments.size} px, batch {arguments.batch}, {arguments.precision}"


def _plot(rows: dict[str, dict[str, Any]], roof: dict[str, float], arguments: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    speeds = [row["images_per_second"]["median"] for row in rows.values()]
    limits = {name: roof[f"{name}_images_per_second"] for name in ("compute", "memory")}
    axes.bar_label(axes.bar(list(rows), speeds), fmt="%.1f")
    for (name, limit), style in zip(limits.items(), ("--", ":"), strict=True):
        axes.axhline(limit, color="black", linestyle=style, label=f"roofline, {name}: {limit:.0f}")
    top = 1.3 * max(*speeds, min(limits.values()))  # a limit far above all would leave no room for the bars
    axes.set(ylabel="images/s", ylim=(0, top), title=_title(arguments))
    axes.legend(loc="upper right", ncols=2)
    figure.savefig(arguments.plot, dpi=120, format="png")


def _circumstances() -> dict[str, Any]:
    """When, with what and how it was measured."""
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


if __name__ == "__main__":
    run_program(main)
