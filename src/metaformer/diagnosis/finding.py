"""Findings of checks."""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from metaformer.errors import one_line


class Verdict(Enum):
    """The result of a check: ok, warn (training works, but slower or with limits) or fail (training will not work)."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    verdict: Verdict
    message: str
    fix: str = ""  # what to do; empty if the verdict is ok

    def __str__(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.verdict.value:5} {self.check:11} {self.message}{fix}"


def ok(check: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(check, Verdict.ok, message)


def warn(check: str, message: str, fix: str) -> Finding:
    """Return a finding for training that works, but not as well as it could."""
    return Finding(check, Verdict.warn, message, fix)


def fail(check: str, message: str, fix: str) -> Finding:
    """Return a finding for training that will not work."""
    return Finding(check, Verdict.fail, message, fix)


Check = Callable[[], Iterator[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """Return a check's findings; an exception in the check becomes a failed finding."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:
        reason = one_line(error) or "no message"
        found.append(fail(name, f"{type(error).__name__}: {reason}", "the check itself failed; resolve this first"))
    return found
