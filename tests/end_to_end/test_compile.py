"""Tests of compile=true with the default options, with inductor on a CPU."""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import QUICK, launch, rows

# Kernels are compiled for each size of the images, so two stages. The second fills DDP's first bucket of 1 MiB, after
# which the compiled network is split.
TWO_STAGES = ("model=metaformer", "model.depths=[1,1]", "model.dims=[8,256]")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler for CPUs")


@needs_compiler
@pytest.mark.parametrize(("ranks", "precision"), [(1, "fp32"), (2, "bf16")])
def test_compiled_training(images: Path, tmp_path: Path, ranks: int, precision: str) -> None:
    """Two steps and a validation: the checkpoint has the usual keys, and uncompiled validate.py gives the same loss.

    With one rank the last batch is shorter, for which the network is compiled again; with two, each has one batch.
    """
    run_dir = tmp_path / "run"
    common = [f"data.root={images}", *QUICK, *TWO_STAGES, f"precision={precision}"]
    common += ["eval_batch_size=100"] if ranks == 2 else []
    done = launch("train", *common, "compile=true", "max_steps=2", f"run_dir={run_dir}", ranks=ranks, timeout=280)
    assert done.code == 0, done.stderr
    losses = [row["loss"] for row in rows(run_dir)]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert "stem.conv.weight" in load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
    plain = (f"data.root={images}", "image_size=32", "workers=1", f"precision={precision}")
    again = launch("validate", *plain, f"checkpoint={run_dir}")
    assert again.code == 0, again.stderr
    assert again.result["loss"] == pytest.approx(done.result["loss"], rel=1e-4 if precision == "fp32" else 1e-2)
