"""Tests of the import structure of the package."""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "metaformer"
COMPONENTS = ("models", "data", "training", "evaluation", "tracking", "reporting", "prediction", "diagnosis")
FOUNDATION = {
    "death_signal",
    "errors",
    "files",
    "goodput",
    "interfaces",
    "kernel_check",
    "program",
    "runtime",
    "signals",
    "streams",
    "targets",
    "wnids",
}


def imports(file: Path) -> set[str]:
    """Return the components and modules of this package that a file imports, such as "data" and "runtime"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("metaformer.")}
    return found


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_import_no_sibling(component: str) -> None:
    """A component imports only itself and the foundation; only assembly/, config.py and composing.py import several."""
    for file in (PACKAGE / component).rglob("*.py"):
        assert imports(file) <= {component} | FOUNDATION, file


def test_foundation_imports_no_component() -> None:
    """The foundation modules import only each other."""
    for name in FOUNDATION:
        assert imports(PACKAGE / f"{name}.py") <= FOUNDATION


def test_config_imports_no_builder_and_entry_points_are_short() -> None:
    """The configuration does not import assembly; the programs' commands have at most 40 lines."""
    for name in ("config", "config_errors", "composing"):
        assert "assembly" not in imports(PACKAGE / f"{name}.py")
    for name in ("train.py", "validate.py"):
        assert len((REPOSITORY / name).read_text().splitlines()) <= 40
        assert len((PACKAGE / "commands" / name).read_text().splitlines()) <= 40


def test_only_the_command_line_imports_commands() -> None:
    """Commands are at the top: no other module of the package imports one."""
    for file in PACKAGE.rglob("*.py"):
        assert "commands" not in imports(file) or file.parent.name == "commands", file


def test_only_two_files_read_the_launchers_variables() -> None:
    """Only program.py and runtime.py read the environment variables of torchrun and SLURM."""
    for file in PACKAGE.rglob("*.py"):
        if file.name not in ("program.py", "runtime.py"):
            text = file.read_text()
            assert not any(f'"{name}"' in text for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")), file
            assert "SLURM_" not in text, file
