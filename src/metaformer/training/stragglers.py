"""Finds a rank that the others wait for. Gradients are exchanged at every step, so the slowest rank sets the pace."""

import statistics
import time

import torch

SLOW = 1.5  # multiple of the median of the other ranks' own work
SHARE = 0.1  # minimum share of the elapsed time that the other ranks lose


class Stopwatch:
    """Measures the seconds of this rank's own work, the forward passes; on a GPU with CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a measurement."""
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """End a measurement."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """Return the seconds measured since the last call. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: float = self._seconds + sum(start.elapsed_time(stop) / 1000 for start, stop in self._events)
        self._events, self._seconds = [], 0.0
        return seconds


def describe_straggler(seconds: list[float], hosts: list[str], elapsed: float) -> str | None:
    """Return a line about the rank that the others wait for, or None.

    Args:
        seconds: each rank's own work, including waits for data.
        hosts: the name of each rank's node.
        elapsed: seconds that have passed.
    """
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    others = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
    if seconds[slowest] < SLOW * others or seconds[slowest] - others < SHARE * elapsed:
        return None
    return (
        f"slow rank    rank {slowest} on {hosts[slowest]}: {100 * seconds[slowest] / elapsed:.0f} % of the time was "
        f"its own work, the others' median is {100 * others / elapsed:.0f} %: they wait for it"
    )
