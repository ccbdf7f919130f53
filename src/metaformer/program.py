"""Startup and exit of a program: exit codes, the launcher's environment variables, and allocator settings.

Imports nothing that is slow to import. Only this file and runtime.py read the launcher's variables.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from metaformer import streams
from metaformer.errors import Interrupted, UserError, warn

LAUNCHER_ADVICE = "start with torchrun, which sets it, or unset it"
_RANK_0_GRACE_SECONDS = 5.0  # seconds for which other ranks let rank 0 report an error that all ranks have
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def run_program(program: Callable[[], None], must_print: bool = True) -> None:
    """Run a program's main function and exit. User errors are reported once, as one line on stderr.

    Within the program, printing never raises an error (see `streams.guard`).

    Args:
        must_print: Fail if stdout cannot be written, because the printed output is the program's result; if False,
            only warn.
    """
    streams.guard()
    try:
        program()
        _check_printed(must_print)
    except UserError as error:
        _fail(f"error: {error}", error.exit_code)
    except Interrupted as error:
        _leave(f"interrupted: {error}" if _rank() == 0 else "", error.exit_code)  # reported once
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # see _leave
    except KeyboardInterrupt:
        _fail("error: interrupted", 128 + signal.SIGINT)


def _check_printed(must_print: bool) -> None:
    """Report that stdout could not be written, as an error if `must_print` and else as a warning."""
    sys.stdout.flush()
    reason = streams.failures().get(streams.STDOUT)
    if reason is None:
        return
    text = f"stdout: cannot be written ({reason}), so the printed output is incomplete"
    if must_print:
        raise UserError(
            f"{text}; requested files are complete; send stdout to a disk with space or a program that reads it"
        )
    warn(text)


def _fail(message: str, exit_code: int) -> None:
    """Report an error and exit.

    Most errors occur on all ranks: the others wait for rank 0 to report it and for torchrun to end them.
    """
    rank = _rank()
    if rank > 0:
        time.sleep(_RANK_0_GRACE_SECONDS)
        kind, _, rest = message.partition(": ")
        message = f"{kind}: rank {rank}: {rest}"
    _leave(message, exit_code)


def _leave(message: str, exit_code: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: on a normal exit, a broken process group may wait for the other ranks.
    os._exit(exit_code)


def _rank() -> int:
    """Return the rank for an error report, or 0 if RANK is not an integer, which may be the error itself."""
    try:
        return launcher_variable("RANK", 0)
    except UserError:
        return 0


def launcher_variable(name: str, default: int) -> int:
    """Return an integer that torchrun sets in the environment.

    Raises:
        UserError: The variable is not an integer.
    """
    value = os.environ.get(name) or default  # some launchers leave variables empty
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name}={value}: not a whole number; {LAUNCHER_ADVICE}") from error


def launched_rank() -> int:
    """Return the rank of this process, which is known before the process group exists."""
    return launcher_variable("RANK", 0)


def announce_start() -> None:
    """Print on rank 0's stderr, if that is a terminal, that the program has started and is importing torch."""
    if launched_rank() == 0 and sys.stderr.isatty():
        ranks = launcher_variable("WORLD_SIZE", 1)
        print(f"starting: {ranks} rank{'s' * (ranks != 1)}, importing torch", file=sys.stderr, flush=True)


def status_file_of_launcher() -> Path | None:
    """Return the file in which the launcher, such as slurm/train.sbatch, expects a copy of the status, or None."""
    path = os.environ.get("METAFORMER_STATUS_FILE")
    return Path(path) if path else None


def keep_freed_memory() -> None:
    """Make the allocator keep freed memory for later tensors; for training on a CPU.

    By default glibc returns a large block to the kernel when it is freed. The next tensor then consists of new pages,
    each of which the kernel must find and clear when it is first written (docs/performance.md). With this setting the
    memory of the process grows until every tensor fits into a freed block. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
