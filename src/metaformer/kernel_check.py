"""A check that kernels work on a device before they are used."""

from collections.abc import Callable


def try_kernels(compare: Callable[[], str | None]) -> str | None:
    """Return a short description of what is wrong with kernels, or None if they work.

    Args:
        compare: Runs the kernels and the plain computation, and returns how their results differ, or None.
    """
    try:
        return compare()
    except Exception as fault:
        # An untested GPU, compiler or Triton can raise anything (Triton's errors share no narrower base class).
        reason = next(iter(str(fault).splitlines()), "")
        return f"they cannot run on this device ({type(fault).__name__}: {reason})"
