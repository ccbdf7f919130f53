"""Where a run's time goes, over all its starts, and how much of it was training that counts."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STARTING, TRAINING, WAITING, VALIDATING, SAVING = "starting", "training", "waiting for data", "validation", "saving"
LOST = "lost"
PHASES = (TRAINING, WAITING, VALIDATING, SAVING, STARTING, LOST)
_OF_PROGRESS = (TRAINING, WAITING, VALIDATING, SAVING)  # what must be done again where no checkpoint holds it


@dataclass
class TimeSpent:
    """What is kept of the time between two starts.

    Attributes:
        starts: so far, this one included.
        seconds: by phase, over all starts.
        unsaved: by phase, of these, since the last checkpoint.
    """

    starts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    unsaved: dict[str, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        """Training's share of the time of all starts, in percent; what was lost and done again is no training."""
        total = sum(self.seconds.values())
        return 100 * self.seconds.get(TRAINING, 0.0) / total if total else 0.0

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = (f"{name} {100 * self.seconds.get(name, 0.0) / total:.1f} %" for name in PHASES)
        return f"{', '.join(shares)} of {total:.0f} s in {self.starts} start{'s' * (self.starts != 1)}"


class Goodput:
    """Counts the time of this process by phase, from its start.

    Time while nothing ran is not counted, nor is what passed between the last record of a start and its being killed.
    """

    def __init__(self) -> None:
        self._spent = TimeSpent(starts=1)
        self._phase, self._since = STARTING, time.monotonic() - _age_of_process()
        self._at_save: dict[str, float] = {}

    def continue_from(self, earlier: TimeSpent) -> None:
        """Add the starts before; of theirs, what was done after the last checkpoint is lost."""
        for name, seconds in earlier.seconds.items():
            self._add(name, seconds)
        for name, seconds in earlier.unsaved.items():
            self._add(name, -seconds)
            self._add(LOST, seconds)
        self._spent.starts += earlier.starts
        self.saved()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is inside the block as a phase of its own."""
        before = self._phase
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, phase: str) -> None:
        """Count as another phase from now on."""
        now = time.monotonic()
        self._add(self._phase, now - self._since)
        self._phase, self._since = phase, now

    def waited(self, seconds: float) -> None:
        """Of the training so far, the loop waited so long for data."""
        self._add(TRAINING, -seconds)
        self._add(WAITING, seconds)

    def saved(self) -> None:
        """A checkpoint holds what has been done so far."""
        self.enter(self._phase)
        self._at_save = dict(self._spent.seconds)

    def spent(self) -> TimeSpent:
        """Up to now."""
        self.enter(self._phase)
        seconds = {name: round(value, 3) for name, value in self._spent.seconds.items()}
        unsaved = {name: round(seconds.get(name, 0.0) - self._at_save.get(name, 0.0), 3) for name in _OF_PROGRESS}
        return TimeSpent(self._spent.starts, seconds, unsaved)

    def _add(self, phase: str, seconds: float) -> None:
        self._spent.seconds[phase] = self._spent.seconds.get(phase, 0.0) + seconds


def _age_of_process() -> float:
    """Seconds since this process was started (man 5 proc, field 22 of stat): imports take some of them."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
