"""Tests of what the programs import before they have read their command line, and of what loader workers import."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import sys
sys.argv[0] = PROGRAM + ".py"
main = __import__(PROGRAM).main
try:
    main()
except (SystemExit, Exception) as end:
    print(f"{type(end).__name__}: {end}", file=sys.stderr)
print([name for name in ("torch", "timm", "numpy", "PIL") if name in sys.modules], file=sys.stderr)
"""


def run(program: str, *arguments: str) -> tuple[str, list[str]]:
    """Return what a program printed, and on stderr how it ended and which slow modules it imported."""
    code = PROGRAM.replace("PROGRAM", repr(program))
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize("program", ["train", "validate"])
def test_help_needs_no_torch(program: str) -> None:
    """--help lists groups and fields, the networks among them, without the imports that take seconds.

    Each field has its default and the comment of its dataclass.
    """
    printed, lines = run(program, "--help")
    assert "poolformer_m48" in printed
    assert ("paper/poolformer_m48" in printed) == ("optimizer=\n" in printed) == (program == "train")
    assert "  eval_batch_size=128\n      integer; images per rank\n" in printed
    assert "  data.source=folder\n      folder (provided by the user), sample (built on " in printed
    assert lines == ["SystemExit: 0", "[]"]


def test_help_shows_the_values_of_the_other_options() -> None:
    """--help with options shows the defaults under them."""
    printed, _ = run("train", "optimizer=lamb", "optimizer.lr=1e-3", "--help")
    assert "  optimizer.name=lamb\n" in printed
    assert (
        "  optimizer.lr=0.001\n      number or null; null: base_lr * global_batch_size / base_batch_size\n" in printed
    )


def test_a_wrong_option_is_refused_without_torch() -> None:
    """An unknown field and a value that cannot work end before those imports."""
    for override, message in (
        ("optimizer.rate=1", "UserError: optimizer.rate: no such field"),
        ("loader.max_pixels=0", "UserError: loader.max_pixels=0: must be at least 1"),
        ("model=resnet", "UserError: model=resnet: unknown; "),
    ):
        _, (error, imported) = run("train", override)
        assert error.startswith(message)
        assert imported == "[]"


@pytest.mark.parametrize("package", [False, True], ids=["nothing", "only metaformer"])
@pytest.mark.parametrize("program", ["train.py", "validate.py", "scripts/doctor.py"])
def test_a_python_without_the_packages(program: str, package: bool) -> None:
    """A Python in which `make install` was not run is told in one line how to start, without a traceback."""
    environment = {"PYTHONPATH": str(REPOSITORY / "src")} if package else {}
    command = [sys.executable, "-S", program]  # without site-packages
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no module {'' if package else 'metaformer; '}")
    assert line.endswith("; run `make install` and start with .venv/bin/python")


@pytest.mark.whole
def test_training_imports_what_it_uses() -> None:
    """Building a training imports no plots, reports, exports, or loaders and trackers that are not chosen.

    Timm imports torch's compiler, as each optimizer of torch does, and wandb where it is installed.
    """
    unused = ("matplotlib", "jinja2", "tensorboard", "onnx", "nvidia.dali", "nvidia.nvimgcodec", "torchcodec", "pandas")
    code = f"import sys, metaformer.assembly; print([name for name in {unused} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


READING = """
import importlib
import sys
from pathlib import Path
from metaformer.data.load.worker_server import PRELOAD

for name in PRELOAD:
    importlib.import_module(name)
from metaformer.data.index.image_index import load_index
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.plan import TrainingPlan

index = load_index(Path(sys.argv[1]), "train")
plan = TrainingPlan(
    num_samples=len(index), global_batch_size=len(index), accumulation_steps=1, rank=0, world_size=1, seed=0,
    image_size=32, crop_pct=0.9, augmentation=AugmentationConfig(),
)
print(len(next(WorkerLoader(TorchReader(), index, plan, 0, 1, False).epoch(0))) == len(index))
print([name for name in ("timm", "torchvision", "torch._dynamo", "wandb", "nvidia.dali") if name in sys.modules])
"""


def test_workers_import_neither_networks_nor_the_compiler(images: Path) -> None:
    """A worker's server, and reading with RandAugment, need torch, PIL and a decoder.

    Timm brings torch's compiler and wandb with it: 140 MB for each rank, and seconds before its first batch.
    """
    command = [sys.executable, "-c", READING, str(images)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("True\n[]\n", "")
