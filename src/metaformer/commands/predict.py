"""Predict the classes of images with a trained network.

  python scripts/predict.py photo.jpg checkpoint=runs/NAME
  python scripts/predict.py photos/ checkpoint=hf:timm/resnet50.a1_in1k --csv predictions.csv --grid grid.png
  find photos -name '*.jpg' | python scripts/predict.py - checkpoint=model.safetensors --json > predictions.jsonl

checkpoint= is as in validate.py: a run folder, a checkpoint, a weights file or a released name. It determines the
network, the preprocessing and the class names. Other options of validate.py may be added, such as
use_ema=true, image_size=384, precision=bf16, eval_batch_size=32, loader=pil or model=timm model.name=NAME. The images
are read in as many threads as there are cores, or in workers=N.

Files that cannot be read are reported on stderr and skipped; the exit code is then 1. It is 2 for wrong options and
if there is no image to predict.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from metaformer.composing import compose_validation
from metaformer.errors import UserError, printable, warn
from metaformer.files import check_output
from metaformer.program import announce_start

_OPTION = re.compile(r"[+~]*[a-z]\w*(\.\w+)*=.*", re.DOTALL)
_ONLY_VALIDATION = ("results_csv", "per_class_csv", "match_classes", "data", "seed")


class PassedOver(UserError):
    """Raised after the predictions if some files could not be read."""

    exit_code = 1


def main() -> None:
    """Predict, print, write the requested files, and report the files that could not be read."""
    arguments, overrides = _parse()
    config = compose_validation(overrides)
    _check_outputs(arguments)
    announce_start()
    from metaformer import assembly, runtime  # takes seconds, which --help and wrong options need not wait for
    from metaformer.data.load.listed_images import list_images
    from metaformer.prediction.results import Results, Wanted

    images, unreadable = list_images(list(_expand(arguments.images)))
    _report(unreadable)
    if not images:
        raise UserError(f"{' '.join(arguments.images)}: no images to predict")
    failed = len(unreadable)
    wanted = Wanted(arguments.top_k, arguments.json, arguments.csv, arguments.grid, arguments.cam)
    with runtime.start() as ranks:
        predictor = assembly.build_predictor(config, ranks, arguments.cam is not None, arguments.cam_layer)
        print(*predictor.notes, sep="\n", file=sys.stderr, flush=True)
        results = Results(wanted, predictor.classes, [image.name for image in images])
        for read, logits, maps in predictor(images):
            _report(read.unreadable)
            failed += len(read.unreadable)
            results.add(read.names, read.pixels, logits, maps)
        results.finish()
    if failed:
        raise PassedOver(f"{failed:,} of {len(images) + len(unreadable):,} could not be read; they are named above")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the overrides of validate.py's configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER|-|NAME=VALUE",
                        help="image files; folders of them; - for names on stdin, one a line; options")  # fmt: skip
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes for each image (5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image instead of the table")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each class of each image")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a picture of the images and their classes")
    parser.add_argument("--cam", type=Path, metavar="FOLDER", help="write Grad-CAM heat maps over the images, as PNG")
    parser.add_argument("--cam-layer", metavar="NAME", help="part of the network for --cam; default: the last stage")
    arguments = parser.parse_intermixed_args()
    overrides = [given for given in arguments.images if _OPTION.fullmatch(given) and not Path(given).exists()]
    arguments.images = [given for given in arguments.images if given not in overrides]
    if arguments.top_k < 1:
        raise UserError(f"--top-k {arguments.top_k}: must be at least 1")
    if arguments.cam_layer is not None and arguments.cam is None:
        raise UserError(f"--cam-layer {arguments.cam_layer}: requires --cam FOLDER; add that, or remove this option")
    for option in overrides:
        if option.lstrip("+~").partition("=")[0].partition(".")[0] in _ONLY_VALIDATION:
            raise UserError(
                f"{option}: validate.py only; predict takes images by name, as in predict.py FOLDER checkpoint=RUN"
            )
    if not arguments.images:
        raise UserError("no image given; give image files, folders, or - to read names from stdin")
    return arguments, overrides


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Check that the files can be written, before the network is built, and create the folder for heat maps."""
    for name in ("csv", "grid"):
        file: Path | None = getattr(arguments, name)
        if file is not None:
            check_output(f"--{name}={file}", file)
    folder: Path | None = arguments.cam
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cam={folder}: cannot be made ({error.strerror}); give another folder") from error
        check_output(f"--cam={folder}", folder / "image.png")


def _expand(names: list[str]) -> Iterator[str]:
    """Yield the names, with - replaced by the names on stdin."""
    for name in names:
        if name == "-":
            lines = (line.removesuffix(b"\r") for line in sys.stdin.buffer.read().split(b"\n"))
            yield from (os.fsdecode(line) for line in lines if line)
        else:
            yield name


def _report(unreadable: Sequence[tuple[str, str]]) -> None:
    for name, reason in unreadable:
        warn(f"{printable(name)}: {printable(reason)}; skipped")
