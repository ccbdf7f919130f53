"""Accounting of a run's time by phase over all its starts, and its goodput."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STARTING, TRAINING, WAITING, VALIDATING, SAVING = "starting", "training", "waiting for data", "validation", "saving"
LOST = "lost"
PHASES = (TRAINING, WAITING, VALIDATING, SAVING, STARTING, LOST)
_REPEATED_PHASES = (TRAINING, WAITING, VALIDATING, SAVING)  # repeated after a resume if not in a checkpoint


@dataclass
class TimeSpent:
    """The times that are carried over from one start of a run to the next.

    Attributes:
        starts: Number of starts so far, including this one.
        seconds: Seconds by phase, over all starts.
        unsaved: The part of `seconds` since the last checkpoint, by phase.
    """

    starts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unsaved: dict[str, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        """Percentage of the time of all starts spent in training, without training that was lost."""
        total = sum(self.seconds.values())
        return 100 * self.seconds.get(TRAINING, 0.0) / total if total else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds of training steps, with their waits for data."""
        return self.seconds.get(TRAINING, 0.0) + self.seconds.get(WAITING, 0.0)

    @property
    def lines(self) -> tuple[str, str]:
        """Return the total and the share of each phase, as lines for a terminal of 80 columns."""
        total = sum(self.seconds.values()) or 1.0
        shares = [f"{name} {100 * self.seconds.get(name, 0.0) / total:.1f} %" for name in PHASES]
        starts = f"{total:.0f} s in {self.starts} start{'s' * (self.starts != 1)}"
        return f"{starts}: {', '.join(shares[:2])},", ", ".join(shares[2:])


class Goodput:
    """Measures the time of this process by phase, beginning at the start of the process.

    Time between starts is not counted, nor is the time between the last record of a start and the moment it is killed.
    """

    def __init__(self) -> None:
        self._spent = TimeSpent(starts=1)
        self._phase, self._since = STARTING, time.monotonic() - _age_of_process()
        self._at_save: dict[str, float] = {}

    def continue_from(self, earlier: TimeSpent) -> None:
        """Add the time of earlier starts, and count their time after the last checkpoint as lost."""
        for name, seconds in earlier.seconds.items():
            self._add(name, seconds)
        for name, seconds in earlier.unsaved.items():
            self._add(name, -seconds)
            self._add(LOST, seconds)
        self._spent.starts += earlier.starts
        self.record_save()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block as the given phase."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, phase: str) -> None:
        """Switch to another phase."""
        now = time.monotonic()
        self._add(self._phase, now - self._since)
        self._phase, self._since = phase, now

    def record_wait(self, seconds: float) -> None:
        """Count a part of the training time so far as waiting for data."""
        self._add(TRAINING, -seconds)
        self._add(WAITING, seconds)

    def record_save(self) -> None:
        """Note that a checkpoint contains everything done so far."""
        self.enter(self._phase)
        self._at_save = dict(self._spent.seconds)

    def spent(self) -> TimeSpent:
        """Return the time spent up to now."""
        self.enter(self._phase)
        seconds = {name: round(value, 3) for name, value in self._spent.seconds.items()}
        unsaved = {name: round(seconds.get(name, 0.0) - self._at_save.get(name, 0.0), 3) for name in _REPEATED_PHASES}
        return TimeSpent(self._spent.starts, seconds, unsaved)

    def _add(self, phase: str, seconds: float) -> None:
        self._spent.seconds[phase] = self._spent.seconds.get(phase, 0.0) + seconds


def _age_of_process() -> float:
    """Return the seconds since this process started, imports included (man 5 proc, field 22 of stat)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
