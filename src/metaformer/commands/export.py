"""Export a trained network for other programs, and check that they compute the same logits.

  python scripts/export.py onnx checkpoint=runs/NAME --out model.onnx
  python scripts/export.py torch checkpoint=runs/NAME use_ema=true --out model.pt2
  python scripts/export.py hub checkpoint=runs/NAME --out NAME_hub [--license apache-2.0] [--push USER/NAME]

checkpoint= is as in validate.py: a run folder, a checkpoint, a weights file or a released name. It determines the
network, the preprocessing and the class names, which are written to the file and to a JSON file next to it.
Options of validate.py may be added: use_ema= model= model.NAME= image_size= num_classes= data.NAME=.

onnx     for ONNX Runtime, TensorRT, OpenVINO and others; needs the packages onnx, onnxscript and onnxruntime
torch    a program of torch.export: `torch.export.load(FILE).module()`, without this project
hub      a folder for the Hugging Face hub in timm's format, with a model card; --push uploads it to a new private
         repository, or to an existing one

The written file is loaded again and compared with the network on images: those of data.root= if given, else the run's
validation split, else the digits of the built-in sample. If a logit differs by more than 1e-4 of the largest logit,
nothing is written. timm's PoolFormer has another head, so only its features are compared. The number of images is
free; their size is fixed.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metaformer.composing import compose_validation
from metaformer.errors import UserError
from metaformer.files import check_output
from metaformer.program import announce_start

if TYPE_CHECKING:
    from metaformer.assembly.exporting import Built

OPTIONS = ("checkpoint", "use_ema", "model", "image_size", "num_classes", "data")
FORMATS = ("onnx", "torch", "hub")


def main() -> None:
    """Build the network, export it, and print the written file and how far the logits differ."""
    arguments = _parse()
    config = compose_validation(arguments.options)
    data_given = any(_field(option) == "data" for option in arguments.options)
    out: Path = arguments.out
    for file in (out, out.with_suffix(".json")) if arguments.format != "hub" else (out,):
        if file.exists():
            raise UserError(f"--out={out}: {file} already exists; give another name, or remove it")
    check_output(f"--out={out}", out)
    announce_start()
    from metaformer import runtime  # takes seconds, which --help and wrong options need not wait for
    from metaformer.assembly.exporting import build_exportable
    from metaformer.models.export.programs import export_onnx, export_program

    if arguments.push is not None:
        from metaformer.models.export.hub_folder import check_repository

        check_repository(arguments.push)
    with runtime.start() as ranks:
        built = build_exportable(config, ranks, data_given)
    network = built.network
    assert network.record.images is not None  # of every network that is exported
    lines = [f"network      {network.record.name}", *network.record.images.lines, f"weights      {network.weights}"]
    print(*built.notes, *lines, sep="\n", file=sys.stderr, flush=True)
    if arguments.format == "hub":
        _export_to_hub(arguments, built)
    else:
        export = export_onnx if arguments.format == "onnx" else export_program
        print(f"{out}: {export(network, out)}")


def _export_to_hub(arguments: argparse.Namespace, built: "Built") -> None:
    from metaformer.assembly.model_facts import collect_facts
    from metaformer.models.export.hub_folder import push, write_hub_folder

    out: Path = arguments.out
    facts = collect_facts(built.weights, built.run, arguments.license)
    title = out.absolute().name if arguments.push is None else arguments.push.partition("/")[2]
    in_timm = write_hub_folder(built.network, facts, out, title)
    if in_timm is None:
        print(f"{out}: timm has no {built.network.record.name}; only metaformer loads this folder")
    else:
        other = "" if in_timm.agreement.holds else "; its head computes other logits, as the card says"
        print(f"{out}: timm's {in_timm.name}: {in_timm.agreement}{other}")
    if arguments.push is not None:
        print(push(out, arguments.push))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="checkpoint=... and other options")
    parser.add_argument("--out", type=Path, required=True, help="file or folder to write; it must not exist")
    parser.add_argument("--push", metavar="USER/NAME", help="repository of the hub to upload the folder to")
    parser.add_argument("--license", metavar="NAME", help="of the weights, as the hub names it; default: unknown")
    arguments = parser.parse_intermixed_args()
    for option in arguments.options:
        if _field(option) not in OPTIONS:
            known = " ".join(f"{name}=" for name in OPTIONS)
            raise UserError(f"{option}: export has no such option; its options are {known} --out")
    for name in ("push", "license"):
        value = getattr(arguments, name)
        if value is not None and arguments.format != "hub":
            raise UserError(f"--{name} {value}: requires the format hub; use that, or remove this option")
    if arguments.format != "hub" and arguments.out.suffix == ".json":
        raise UserError(f"--out={arguments.out}: is the name of the description; use one that ends with .onnx or .pt2")
    return arguments


def _field(option: str) -> str:
    """Return the top-level field or group that an option sets."""
    return option.lstrip("+~").partition("=")[0].partition(".")[0]
