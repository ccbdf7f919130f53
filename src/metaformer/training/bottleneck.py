"""Tells whether training waits for data: one line per epoch, with what would help."""

INPUT_BOUND = 0.1  # share of an epoch's time spent waiting for data, from which training counts as input-bound


class Bottleneck:
    """The waiting time of an epoch, added up over its log rows.

    Args:
        advice: what would make loading faster, with the present settings.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._waited = self._elapsed = 0.0

    def add(self, waited: float, elapsed: float) -> None:
        """Add the seconds that the ranks waited on average, and the seconds that passed."""
        self._waited += waited
        self._elapsed += elapsed

    def verdict(self, epoch: int) -> str:
        """Return the line for an epoch, and start the next one."""
        share = self._waited / self._elapsed if self._elapsed else 0.0
        self._waited = self._elapsed = 0.0
        if share < INPUT_BOUND:
            return f"epoch {epoch} compute-bound: {100 * share:.0f} % of its time went to waiting for data"
        return f"epoch {epoch} input-bound: {100 * share:.0f} % of its time went to waiting for data; {self._advice}"
