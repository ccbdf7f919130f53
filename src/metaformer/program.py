"""How a program starts and ends: exit codes, what the launcher sets in the environment, and the allocator.

Imports nothing that takes long. Only this file and runtime.py read the launcher's variables.
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

START_RANKS = "start with torchrun, which sets it, or unset it"
_GRACE_FOR_RANK_0 = 5.0  # seconds that other ranks give rank 0 to report an error that all ranks have
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt


def run_program(program: Callable[[], None], must_print: bool = True) -> None:
    """Run a program's main function and exit: errors of the user's making end in one line, once, on stderr.

    Nothing that is printed meanwhile raises an error (`streams.guard`).

    Args:
        must_print: what the program prints is its result, and where that cannot be written it has failed; else a
            warning says so.
    """
    streams.guard()
    try:
        program()
        _check_printed(must_print)
    except UserError as error:
        _fail(f"error: {error}", error.exit_code)
    except Interrupted as error:
        _leave(f"interrupted: {error}" if _rank() == 0 else "", error.exit_code)  # said once
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # as in _fail
    except KeyboardInterrupt:
        _fail("error: interrupted", 128 + signal.SIGINT)


def _check_printed(must_print: bool) -> None:
    """Say that stdout could not be written.

    Raises:
        UserError: it must be.
    """
    sys.stdout.flush()
    reason = streams.failures().get(streams.STDOUT)
    if reason is None:
        return
    text = f"stdout: cannot be written ({reason}), and what was printed is not complete"
    if must_print:
        raise UserError(f"{text}; files that were asked for are; print to a place with room and a reader")
    warn(text)


def _fail(message: str, exit_code: int) -> None:
    """Report and exit. Most errors are every rank's: the others wait for rank 0 to say it and be ended by torchrun."""
    rank = _rank()
    if rank > 0:
        time.sleep(_GRACE_FOR_RANK_0)
        kind, _, rest = message.partition(": ")
        message = f"{kind}: rank {rank}: {rest}"
    _leave(message, exit_code)


def _leave(message: str, exit_code: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: a broken process group may wait for the other ranks on its way out.
    os._exit(exit_code)


def _rank() -> int:
    """For whoever reports an error, which may be that this is no number."""
    try:
        return launcher_variable("RANK", 0)
    except UserError:
        return 0


def launcher_variable(name: str, default: int) -> int:
    """Return an integer that torchrun sets in the environment.

    Raises:
        UserError: it is not an integer.
    """
    given = os.environ.get(name) or default  # some launchers set all of them, and leave some empty
    try:
        return int(given)
    except ValueError as error:
        raise UserError(f"{name}={given}: not a whole number; {START_RANKS}") from error


def launched_rank() -> int:
    """This process's rank, known before it has joined the others."""
    return launcher_variable("RANK", 0)


def status_file_of_launcher() -> Path | None:
    """A file in which the program that started this one wants to read how it ended, as slurm/train.sbatch does."""
    named = os.environ.get("METAFORMER_STATUS_FILE")
    return Path(named) if named else None


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for tensors to come: for training on a CPU.

    glibc gives a large block back when it is freed; the next tensor is then new pages, each of which the kernel must
    find and clear when it is first written (docs/performance.md). What is held grows for a while, until glibc finds a
    place in it for each tensor. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
