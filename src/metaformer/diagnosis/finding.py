"""What a check found."""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from metaformer.errors import one_line


class Verdict(Enum):
    """ok: as it should be. warn: training works, but slower or with less. fail: it will not work."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    verdict: Verdict
    said: str
    mend: str = ""  # what to do, unless all is well

    def __str__(self) -> str:
        mend = f"; {self.mend}" if self.mend else ""
        return f"{self.verdict.value:5} {self.check:11} {self.said}{mend}"


def ok(check: str, said: str) -> Finding:
    """As it should be."""
    return Finding(check, Verdict.ok, said)


def warn(check: str, said: str, mend: str) -> Finding:
    """Training works, but not as well as it could."""
    return Finding(check, Verdict.warn, said, mend)


def fail(check: str, said: str, mend: str) -> Finding:
    """Training will not work."""
    return Finding(check, Verdict.fail, said, mend)


Check = Callable[[], Iterator[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """A check's findings; one that breaks has failed, and the others still run."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:
        reason = one_line(error) or "no message"
        found.append(fail(name, f"{type(error).__name__}: {reason}", "the check itself broke; look into this first"))
    return found
