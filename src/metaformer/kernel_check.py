"""Kernels that a device may compute wrongly, or not at all, are tried before they are used."""

from collections.abc import Callable


def try_kernels(compare: Callable[[], str | None]) -> str | None:
    """Return what is wrong with kernels, in a few words; None where nothing is.

    Args:
        compare: runs them beside the plain computation, and says how they differ.
    """
    try:
        return compare()
    except Exception as fault:
        # Whatever an untried GPU, compiler or triton raises (its own errors share no narrower base): callers report it.
        reason = next(iter(str(fault).splitlines()), "")
        return f"they cannot run on this device ({type(fault).__name__}: {reason})"
