"""Commands that reproduce a row; the end-to-end tests run them."""

import sys
from pathlib import Path

import pytest

from metaformer.errors import UserError
from metaformer.reporting.commands import submit_command, train_command, validate_command
from metaformer.reporting.paper import find_rows

(S12, IDENTITY, GMLP, VIT) = find_rows(
    ["paper/poolformer_s12", "ablation/identity", "comparison/gmlp_s", "comparison/vit_b16"]
)


def test_training_with_and_without_torchrun() -> None:
    """One process is started directly and several by torchrun, with the recipe and the run folder."""
    recipe = ["train.py", "experiment=paper/poolformer_s12", "run_dir=runs/a b"]
    assert train_command(S12, Path("runs/a b"), 1) == [sys.executable, *recipe]
    assert train_command(S12, Path("runs/a b"), 8)[-4:] == ["--nproc_per_node=8", *recipe]


def test_submission_is_a_throttled_array() -> None:
    """sbatch's options come before the script and the rows after it; arguments after -- are for train.py."""
    command = submit_command([S12, IDENTITY], Path("a b"), 3, ["--nodes=2"])
    assert command == [
        "sbatch", "--array=0-1%3", "--nodes=2", "slurm/reproduce_table.sbatch", "--runs=a b", "paper/poolformer_s12",
        "ablation/identity", "--",
    ]  # fmt: skip


def test_released_weights_are_evaluated_as_they_expect() -> None:
    """This project's networks are named by group; timm's by the tag, which sets the preprocessing, at 224 px."""
    assert validate_command(S12, Path("r.csv"), 1)[1:] == [
        "validate.py", "model=poolformer_s12", "checkpoint=official:poolformer_s12", "results_csv=r.csv",
    ]  # fmt: skip
    command = validate_command(GMLP, Path("r.csv"), 1)
    assert command[2:5] == ["model=timm", "model.name=gmlp_s16_224.ra3_in1k", "image_size=224"]
    with pytest.raises(UserError, match=r"^row=comparison/vit_b16: .*no released weights"):
        validate_command(VIT, Path("r.csv"), 1)
