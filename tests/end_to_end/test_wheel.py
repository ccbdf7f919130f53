"""Test that an installed wheel trains, away from the repository."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from metaformer import __version__
from tests.conftest import QUICK, REPOSITORY

SOURCES = ("src", "conf", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
SMALL = (*QUICK, "model=timm", "model.name=test_resnet", "max_steps=2")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that does not see the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "venv"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("metaformer-*.whl")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    done = run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("\n".join(shared))  # after the wheel's own folder, which therefore counts
    return environment / "bin"


def test_the_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    """The environment imports the wheel, which has conf/, its types and its files that are not Python."""
    code = "import metaformer.composing as c; print(c.__file__, c.CONF_FOLDER)"
    file, conf = map(Path, run(installed / "python", "-c", code, cwd=tmp_path).stdout.split())
    assert file.is_relative_to(installed.parent)
    assert {str(path.relative_to(conf)) for path in conf.rglob("*.yaml")} == {
        str(path.relative_to(REPOSITORY / "conf")) for path in (REPOSITORY / "conf").rglob("*.yaml")
    }
    package, source = file.parent, REPOSITORY / "src" / "metaformer"
    others = [
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [path for path in others if not (package / path).is_file()] == []


def test_an_installed_wheel_trains(installed: Path, images: Path, tmp_path: Path) -> None:
    """`metaformer train` trains and `metaformer validate` evaluates, in a folder that was empty."""
    done = run(installed / "metaformer", "train", f"data.root={images}", *SMALL, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["command"][0] == "metaformer train"
    evaluation = ("model=timm", "model.name=test_resnet", "checkpoint=run", f"data.root={images}", "workers=1")
    done = run(installed / "metaformer", "validate", *evaluation, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] > 0


def test_torchrun_starts_the_module(installed: Path, images: Path, tmp_path: Path) -> None:
    """`torchrun -m metaformer train` trains on two ranks."""
    torchrun = (installed / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    command = (*torchrun, "-m", "metaformer", "train", f"data.root={images}", *SMALL, "run_dir=run")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ((), 0, "usage: metaformer COMMAND"),
        (("--help",), 0, "usage: metaformer COMMAND"),
        (("--version",), 0, f"metaformer {__version__}\n"),
        (("train", "--version"), 0, f"metaformer {__version__}\n"),
        (("train", "--help"), 0, "usage: metaformer train [NAME=VALUE ...]"),
        (("trian",), 2, "error: command=trian: unknown; did you mean train?"),
        (("train", "lr=1"), 2, "error: lr: no such field; use optimizer.lr=..."),
        (("prepare", "--help"), 0, "usage: metaformer prepare"),
    ],
)
def test_the_command(installed: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, expected: str) -> None:
    """The command lists and runs its commands, and a mistake ends in one line."""
    done = run(installed / "metaformer", *arguments, cwd=tmp_path)
    assert (done.returncode, (done.stdout or done.stderr)[: len(expected)]) == (code, expected)
