"""Kills a process whose own threads cannot run: `python backstop.py PID SECONDS DUMP_SECONDS`.

Each byte on stdin is a beat; the end of stdin means that the process has ended. Without a beat for SECONDS, the process
receives SIGUSR2, on which faulthandler writes its stacks, and SIGKILL DUMP_SECONDS later. Time during which either
process is stopped (SIGSTOP, a suspended machine) does not count. Uses only the standard library, to start quickly.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

TICK = 1.0  # seconds


def main() -> None:
    """Watch the process until it ends."""
    pid, bound, dump_seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    tick, silent = min(TICK, bound / 10), 0.0
    while silent < bound:
        before = time.monotonic()
        readable, _, _ = select.select([sys.stdin], [], [], tick)
        if readable:
            if not os.read(sys.stdin.fileno(), 4096):
                return
            silent = 0.0
        elif not _is_stopped(pid):
            silent += min(time.monotonic() - before, 2 * tick)  # a longer pause: this process was stopped
    os.kill(pid, signal.SIGUSR2)
    time.sleep(dump_seconds)
    os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # it has ended; stdin will say so
        return False


if __name__ == "__main__":
    main()
