"""Classes and functions of the user's own, which a configuration names as `package.module:Class`."""

import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from metaformer.errors import UserError, one_line


def check_target(field: str, target: str) -> None:
    """Raise an error unless the text has the form `package.module:Class`. Nothing is imported."""
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", target):
        raise UserError(f"{field}={target}: must be package.module:Class, as in {field}=my_package.networks:Network")


def import_target(field: str, target: str) -> Callable[..., Any]:
    """Import the class or function `package.module:Class`.

    Args:
        field: the configuration field, for error messages.
    """
    check_target(field, target)
    try:
        found: Callable[..., Any] = resolve_name(target)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"{field}={target}: cannot be imported ({one_line(error)}); the package must be in the current folder, in "
            "the folder of --config-dir, in PYTHONPATH, or installed"
        ) from error
    except Exception as error:  # a module may raise anything while it is imported
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{where.filename}:{where.lineno}"
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{field}={target}: cannot be imported ({reason}; {line}); correct the module") from error
    if not callable(found):
        raise UserError(f"{field}={target}: is neither a class nor a function; name one")
    return found


def make_importable(folders: Iterable[str | Path]) -> None:
    """Append folders to those from which Python imports, so that none of them hides an installed package."""
    for folder in map(str, (Path(folder).absolute() for folder in folders)):
        if folder not in sys.path:
            sys.path.append(folder)
