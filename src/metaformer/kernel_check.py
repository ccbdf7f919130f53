"""Checks kernels before they are used, because a device may compute wrong results or fail to run them."""

from collections.abc import Callable


def try_kernels(compare: Callable[[], str | None]) -> str | None:
    """Return a short description of the kernels' fault, or None if they work.

    Args:
        compare: runs the kernels and the plain computation, and returns a description of their difference or None.
    """
    try:
        return compare()
    except Exception as error:
        # A GPU, compiler or Triton may raise anything (Triton's errors have no narrower base class); callers report it.
        reason = next(iter(str(error).splitlines()), "")
        return f"they cannot run on this device ({type(error).__name__}: {reason})"
