"""Errors that a user can mend: one line that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user gave cannot work. The message is one line: the field or file, what is wrong, the mend."""

    exit_code = 2


class Interrupted(Exception):
    """Training was asked to stop and has saved where it stands. The message is one line; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


def unknown_name(field: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a component chosen by a name that does not exist: lists the nearest names, or all of a few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5)
    offer = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:20])}"
    more = f" and {len(names) - 20} more" if not near and len(names) > 20 else ""
    return UserError(f"{field}={name}: unknown; {offer}{more}")


def printable(text: str, most: int = 100) -> str:
    """Return text from a file or a server for a message: cut after `most` characters, control characters escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown + ("..." if len(text) > most else "")
