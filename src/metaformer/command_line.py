"""The command `metaformer`: `metaformer train data.root=FOLDER` runs what `python train.py data.root=FOLDER` does."""

import importlib
import sys

from metaformer import __version__
from metaformer.death_signal import end_with_launcher
from metaformer.errors import unknown_name
from metaformer.program import run_program

COMMANDS = {  # each is a module of metaformer.commands
    "train": "train a network; the same command again resumes",
    "validate": "evaluate weights or a run",
    "predict": "predict the classes of images",
    "report": "write the report of a run, or of runs beside each other",
    "prepare": "prepare a data set: ImageNet, Imagenette, a folder, the sample",
    "export": "write a trained network as ONNX, as a torch.export program or for the Hugging Face hub",
    "doctor": "check this machine before training",
}


def main() -> None:
    """Run the command that sys.argv names."""
    end_with_launcher()  # before the slow imports of the command
    run_program(_run, must_print=sys.argv[1:2] != ["train"])  # the run folder also has train's result


def _run() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        print(f"metaformer {__version__}")
    elif name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    else:
        sys.argv = [f"metaformer {name}", *arguments]
        importlib.import_module(f"metaformer.commands.{name}").main()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        (
            "usage: metaformer COMMAND [OPTION ...]",
            "       torchrun --nproc_per_node=8 -m metaformer COMMAND [OPTION ...]",
            "",
            *(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()),
            "",
            "metaformer COMMAND --help lists a command's options; metaformer --version prints the version.",
        )
    )
