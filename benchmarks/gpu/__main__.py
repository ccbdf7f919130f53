"""Predict the time and memory traffic of a training step on GPUs, on a machine without one.

  python -m benchmarks.gpu
  python -m benchmarks.gpu --measured train.json   # next to the measurements of benchmarks.train on a GPU
  python -m benchmarks.gpu --update                # write the budgets that the tests check

The step is that of the training loop, with fused operators. The bytes count each tensor once for every launch that
reads or writes it. A launch takes as long as its slowest part: memory traffic, instructions (counted in the compiled
kernels) or matrix products. A step takes the device's time, or the host's if that is longer.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.gpu import budgets
from benchmarks.gpu.model import GPUS, by_part, predict, step_seconds
from benchmarks.gpu.recording import Launch, Setting, record_randaugment, record_step
from benchmarks.harness import console
from metaformer.errors import UserError, unknown_name
from metaformer.files import write_text_atomically
from metaformer.models.variants import VARIANTS
from metaformer.program import run_program

Steps = dict[int, list[Launch]]  # by architecture


def main() -> None:
    """Print a table for each batch size and a line for each GPU, or update the budgets."""
    arguments = _parse()
    if arguments.update:
        kept = {setting: record_step(setting, budgets.ARCH) for setting in budgets.SETTINGS}
        augmentation = record_randaugment(budgets.SETTINGS[0], budgets.ARCH)
        found = budgets.figures_of(kept, augmentation)
        versions = {name: version(name) for name in ("torch", "triton")}
        write_text_atomically(budgets.FILE, budgets.text_of(found, versions))
        return
    lines = []
    for batch in arguments.batch:
        setting = Setting(arguments.model, arguments.size, batch)
        steps = {arch: record_step(setting, arch) for arch in sorted({gpu.arch for gpu in GPUS.values()})}
        _print(setting, steps)
        lines += _lines(setting, steps, arguments.measured)
        lines.append(_randaugment_line(setting))
    for line in lines:
        print(line)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="poolformer_s12")
    parser.add_argument("--size", type=int, default=224, help="pixels per side")
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 128])
    parser.add_argument("--measured", type=Path, nargs="+", metavar="FILE", default=[])
    parser.add_argument("--update", action="store_true", help="write the budgets instead")
    arguments = parser.parse_args()
    if arguments.model not in VARIANTS:
        raise unknown_name("--model", arguments.model, VARIANTS)
    if arguments.size < 32:
        raise UserError(f"--size={arguments.size}: must be at least 32")
    if min(arguments.batch) < 1:
        raise UserError(f"--batch={min(arguments.batch)}: must be at least 1")
    arguments.measured = [_read(file) for file in arguments.measured]
    return arguments


def _read(file: Path) -> dict[str, Any]:
    """Read a file written by `benchmarks.train --json`."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        _ = found["device"], found["variants"], found["model"], found["size"], found["batch"], found["precision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--measured={file}: is not a file that benchmarks.train --json wrote ({error!r})") from error
    return found


def _print(setting: Setting, steps: Steps) -> None:
    table = Table("part", "launches", "MB an image", title=f"PREDICTED, not measured: {setting}, one training step")
    for name in GPUS:
        table.add_column(f"{name} ms", justify="right")
    grouped = {arch: by_part(launches) for arch, launches in steps.items()}
    first = next(iter(grouped.values()))
    for part in sorted(first, key=lambda part: -sum(launch.bytes for launch in first[part])):
        _add_row(table, part, {arch: parts[part] for arch, parts in grouped.items()}, setting.batch)
    table.add_section()
    _add_row(table, "sum", steps, setting.batch)
    console().print(table)


def _add_row(table: Table, name: str, launches: Steps, batch: int) -> None:
    times = [predict(launches[gpu.arch], gpu) for gpu in GPUS.values()]
    # (i) marks kernels that are limited by their instructions.
    cells = [
        f"{1000 * time.seconds:.2f}" + (" (i)" if time.issue_seconds > 0.95 * time.seconds else "") for time in times
    ]
    table.add_row(name, str(times[0].launches), f"{times[0].bytes / batch / 1e6:.2f}", *cells)


def _lines(setting: Setting, steps: Steps, measured: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, gpu in GPUS.items():
        time = predict(steps[gpu.arch], gpu)
        seconds = step_seconds(time)
        limit = ", limited by the host" if seconds > time.seconds else ""
        predicted = setting.batch / seconds
        lines.append(f"{name} {setting}: {predicted:,.0f} images/s (predicted{limit})")
        for found in measured:
            fused = found["variants"].get("fused")
            same = (found["model"], found["size"], found["batch"], found["precision"]) == setting
            if fused is not None and same and name in found["device"]:
                speed = fused["images_per_second"]["fastest_quartile"]
                lines.append(f"{name} {setting}: {speed:,.0f} images/s (measured, {speed / predicted - 1:+.0%})")
    return lines


def _randaugment_line(setting: Setting) -> str:
    """Return a line about RandAugment of DALI's images, which runs before the step and is not part of it.

    Its time is not predicted: each launch runs one of many branches, and the model counts the instructions of all.
    """
    launches = record_randaugment(setting, budgets.ARCH)
    moved = sum(launch.bytes for launch in launches) / setting.batch / 1e6
    return f"RandAugment {setting.image_size} px: {len(launches)} launches, at most {moved:.2f} MB an image (predicted)"


if __name__ == "__main__":
    run_program(main)
