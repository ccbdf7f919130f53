"""Convert a network's weights between the key layouts of timm and the paper's authors.

python scripts/convert_weights.py official:poolformer_s12 poolformer_s12.safetensors --to timm
python scripts/convert_weights.py runs/RUN poolformer_s12.pth.tar --to official
python scripts/convert_weights.py foreign.pth foreign.safetensors --to timm --by-order tf_efficientnet_lite0

IN is anything that validate.py accepts as checkpoint=: a weights file of this project, of timm or of the authors, a
checkpoint folder, a run folder, or a name to download. --to timm writes a safetensors file, which also suits this
project because it uses timm's keys. --to official writes a torch file for the code of the network's authors.

--by-order NAME is for weights of another program, whose tensors are those of timm's network NAME in the same order
under other names. Shapes and the last part of each name must agree. That does not prove that the network is the same:
compare its accuracy before using it.
"""

import argparse
from pathlib import Path

import timm
import torch

from metaformer.assembly import locate_weights
from metaformer.errors import UserError, printable
from metaformer.files import check_output, write_atomically
from metaformer.models.config import Library
from metaformer.models.record import Record, read_record
from metaformer.models.weight_formats import (
    StateDict,
    check_complete,
    is_official,
    metaformer_to_official,
    official_to_metaformer,
)
from metaformer.models.weight_reader import read_weights
from metaformer.models.weights import save_state
from metaformer.program import run_program


def main() -> None:
    """Read, check and convert the weights, and write them to OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="file, checkpoint folder, run folder or name")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write; it must not exist")
    parser.add_argument("--to", choices=("official", "timm"), required=True, help="key layout to write")
    parser.add_argument("--by-order", metavar="NAME", help="name IN's tensors as those of a network of timm, in order")
    parser.add_argument("--use-ema", action="store_true", help="convert the averaged weights")
    arguments = parser.parse_args()
    out: Path = arguments.out
    name: str | None = arguments.by_order
    if name is not None and (arguments.to != "timm" or not timm.is_model(name)):
        raise UserError(f"--by-order {name}: give the name of a network of timm, and --to timm")
    if out.exists():
        raise UserError(f"{out}: already exists; give another name, or remove it")
    check_output(f"{out}", out)
    located = locate_weights("IN", arguments.source, arguments.use_ema)
    weights = read_weights(located.path, located.use_ema)
    try:
        if name is not None:
            state, classes = rename_by_order(weights.state, name)
            record: Record | str = Record(name, Library.timm, num_classes=classes)
        else:
            state = official_to_metaformer(weights.state) if is_official(weights.state) else weights.state
            check_complete(state)
            classes = state["head.fc.weight" if "head.fc.weight" in state else "head.fc.fc2.weight"].shape[0]
            record = read_record(located.path) or located.name
    except ValueError as error:
        layout = "a known layout" if name is None else f"the order of timm's {name}"
        raise UserError(f"{located.path}: not a complete network in {layout}: {printable(str(error), 500)}") from error
    write(state, out, arguments.to, record)
    tensors, parameters = len(state), sum(tensor.numel() for tensor in state.values())
    print(f"{out}: {tensors} tensors, {parameters:,} values, {classes} classes, in {arguments.to}'s keys")


def rename_by_order(state: StateDict, name: str) -> tuple[StateDict, int]:
    """Return the tensors with the keys of timm's network, which must have the same order, and its number of classes.

    Raises:
        ValueError: A tensor has another shape or kind than timm's, or there are more or fewer.
    """
    model = timm.create_model(name)
    if len(state) != len(model.state_dict()):
        raise ValueError(f"{len(state)} tensors, of which timm's has {len(model.state_dict())}")
    renamed = {}
    for (key, tensor), (expected, like) in zip(state.items(), model.state_dict().items(), strict=True):
        if tensor.shape != like.shape or key.rpartition(".")[2] != expected.rpartition(".")[2]:
            raise ValueError(f"{key} {list(tensor.shape)} in place of {expected} {list(like.shape)}")
        renamed[expected] = tensor
    return renamed, model.num_classes


def write(state: StateDict, out: Path, target: str, network: Record | str) -> None:
    """Write a state dict that has this project's keys in the layout of `target`; leave no file if writing fails.

    Args:
        network: What the source records of its network, or the name of the source, for a safetensors file's metadata.
    """

    def write_file(temporary: Path) -> None:
        if target == "timm":
            save_state(state, temporary, network)
        else:
            torch.save(metaformer_to_official(state), temporary)

    try:
        write_atomically(out, write_file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{out}: cannot be written ({str(error).splitlines()[0]})") from error


if __name__ == "__main__":
    run_program(main)
