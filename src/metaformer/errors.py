"""Errors that a user can fix, reported in one line, and warnings."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error in the user's input. The message is one line: the field or file, what is wrong, and the fix.

    Any function may raise it. `Raises` sections list it only where a caller handles it.

    Unprintable characters in the message, such as a line break in a file name, are escaped.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Diverged(UserError):
    """Training cannot continue: weights, loss or gradients are not finite, or the ranks no longer agree."""

    exit_code = 3


class Interrupted(Exception):
    """Training was asked to stop and has saved its state. The message is one line; the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL in sysexits.h: try again


def printable(text: str, max_length: int | None = None) -> str:
    """Return a text as a single printable line, with unprintable characters escaped.

    Args:
        max_length: Maximum number of characters; longer texts are cut. Use it for texts from a file or a server.
    """
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:max_length]
    )
    return shown + ("..." if max_length is not None and len(text) > max_length else "")


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, with all white space collapsed to single spaces."""
    return " ".join(str(error).split())


def warn(text: str) -> None:
    """Print a one-line warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def check_at_least(minimum: int, config: Any, *names: str, prefix: str = "") -> None:
    """Raise an error that names a configuration field below a minimum; None is allowed.

    Args:
        prefix: the part of the fields' full names before `names`, such as "checkpoint.".
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UserError(f"{prefix}{name}={value}: must be at least {minimum}")


def unknown_name(field: str, name: str, choices: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist. It lists similar names, or else the first 20 choices."""
    names = sorted(choices)
    near = difflib.get_close_matches(name, names, n=5)
    offer = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:20])}"
    more = f" and {len(names) - 20} more" if not near and len(names) > 20 else ""
    return UserError(f"{field}={name}: unknown; {offer}{more}")
