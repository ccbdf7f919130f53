"""Reports for each epoch whether training waits for data, for which stage of loading, and which options help."""

from metaformer.interfaces import Waiting

INPUT_BOUND = 0.1  # share of an epoch's time spent waiting for data from which the epoch counts as input-bound
STAGES = Waiting._fields
NAMES = {"read": "reading files", "decode": "decoding", "augment": "augmentation", "copy": "copying batches"}


def add_waits(one: Waiting, other: Waiting) -> Waiting:
    """Return the sum of two waits, stage by stage."""
    return Waiting(*(a + b for a, b in zip(one, other, strict=True)))


class Bottleneck:
    """Accumulates the waiting time of an epoch over its log rows.

    Args:
        advice: for each stage, options that make it faster with the current settings.
    """

    def __init__(self, advice: dict[str, str]) -> None:
        self._advice = advice
        self._waited, self._elapsed = Waiting(), 0.0

    def add(self, waited: Waiting, elapsed: float) -> None:
        """Add the mean waiting time of the ranks, and the elapsed seconds."""
        self._waited = add_waits(self._waited, waited)
        self._elapsed += elapsed

    def verdict(self, epoch: int) -> str:
        """Return the report of an epoch, and start the next one."""
        waited, total = self._waited, self._waited.total
        share = total / self._elapsed if self._elapsed else 0.0
        self._waited, self._elapsed = Waiting(), 0.0
        time_waited = f"{100 * share:.0f} % of its time went to waiting for data"
        if share < INPUT_BOUND:
            return f"epoch {epoch} compute-bound: {time_waited}"
        by_stage = sorted(zip(STAGES, waited, strict=True), key=lambda pair: -pair[1])
        slowest = by_stage[0][0]
        parts = ", ".join(f"{NAMES[stage]} {100 * seconds / total:.0f} %" for stage, seconds in by_stage)
        return f"epoch {epoch} input-bound: {time_waited} ({parts}); for {NAMES[slowest]}, {self._advice[slowest]}"
