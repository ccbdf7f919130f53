"""Errors that a user can mend: one line that says what is wrong, where, and what to do."""

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """What the user gave cannot work. The message is one line: the field or file, what is wrong, the mend.

    What cannot be printed in it, such as a line break in a file's name, is escaped.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Diverged(UserError):
    """Training cannot continue: the weights, the loss or the gradients are not finite, or ranks no longer agree."""

    exit_code = 3


class Interrupted(Exception):
    """Training was asked to stop and has saved where it stands. The message is one line; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


def printable(text: str, most: int | None = None) -> str:
    """A text as one line that every terminal and file takes: what cannot be printed is escaped.

    Args:
        most: characters of the text that are shown, where it comes from a file or a server.
    """
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:most])
    return shown + ("..." if most is not None and len(text) > most else "")


def one_line(error: BaseException) -> str:
    """Return an error's message with all white space folded into single spaces."""
    return " ".join(str(error).split())


def warn(text: str) -> None:
    """Print a warning of one line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def check_at_least(minimum: int, config: Any, *names: str, prefix: str = "") -> None:
    """Refuse fields of a configuration that are less than a minimum; None is allowed.

    Args:
        prefix: what the user writes before the names, as in "checkpoint.".

    Raises:
        UserError: names the field.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UserError(f"{prefix}{name}={value}: must be at least {minimum}")


def unknown_name(field: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a component chosen by a name that does not exist: lists the nearest names, or all of a few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5)
    offer = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:20])}"
    more = f" and {len(names) - 20} more" if not near and len(names) > 20 else ""
    return UserError(f"{field}={name}: unknown; {offer}{more}")
