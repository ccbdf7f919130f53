"""Run train.py or validate.py (the first argument) with a wrong fused kernel on the rank $FAULTY_RANK."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
import validate
from metaformer.models.kernels import operators
from metaformer.models.kernels.backend import REFERENCE
from metaformer.program import run_program

if __name__ == "__main__":
    program = {"train": train.main, "validate": validate.main}[sys.argv.pop(1)]
    if os.environ.get("RANK", "0") == os.environ.get("FAULTY_RANK", "0"):
        wrong = REFERENCE._replace(gelu=lambda hidden: REFERENCE.gelu(hidden) * 1.5)
        vars(operators)["kernels_for"] = lambda x: wrong
    run_program(program)
