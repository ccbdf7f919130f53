"""Tests of importing classes that a configuration names."""

import sys
from pathlib import Path

import pytest

from metaformer.errors import UserError
from metaformer.targets import import_target, make_importable


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules, on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_part.py").write_text("class Part: ...\nvalue = 3\n")
    (tmp_path / "own_broken.py").write_text("\nraise RuntimeError('no\\nlicence')\n")
    (tmp_path / "json.py").write_text("hidden = True\n")
    make_importable([tmp_path, tmp_path])
    return tmp_path


def test_a_class_is_imported(folder: Path) -> None:
    """A class in an added folder is found; a module there does not hide another of the same name."""
    assert sys.path.count(str(folder)) == 1
    assert import_target("model.target", "own_part:Part").__module__ == "own_part"
    assert import_target("model.target", "json:dumps")([1]) == "[1]"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Part", "must be package.module:Class, as in f=my_package.networks:Network"),
        ("own_part:", "must be package.module:Class"),
        ("../x:Part", "must be package.module:Class"),
        ("no_such_part:Part", "cannot be imported (No module named 'no_such_part'); the package must be in the"),
        ("own_part:Other", "cannot be imported (module 'own_part' has no attribute 'Other')"),
        ("own_part:value", "is neither a class nor a function"),
        ("own_broken:Part", r"own_broken.py:2); correct the module"),
    ],
)
def test_errors(folder: Path, target: str, expected: str) -> None:
    """A failed import gives one line that names the field, the reason and the fix."""
    with pytest.raises(UserError) as caught:
        import_target("f", target)
    assert str(caught.value).startswith(f"f={target}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
