"""Whether training waits for its data: one line an epoch that says what to turn."""

INPUT_BOUND = 0.1  # share of an epoch's time spent waiting, from which on data is what to make faster


class Bottleneck:
    """Adds up an epoch's time, over its log rows.

    Args:
        advice: what makes the data come faster, with what is set now.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._waited = self._elapsed = 0.0

    def add(self, waited: float, elapsed: float) -> None:
        """Seconds that ranks waited for data on average, and that passed."""
        self._waited += waited
        self._elapsed += elapsed

    def verdict(self, epoch: int) -> str:
        """The line for an epoch; the next one begins."""
        share = self._waited / self._elapsed if self._elapsed else 0.0
        self._waited = self._elapsed = 0.0
        if share < INPUT_BOUND:
            return f"epoch {epoch} compute-bound: {100 * share:.0f} % of its time went to waiting for data"
        return f"epoch {epoch} input-bound: {100 * share:.0f} % of its time went to waiting for data; {self._advice}"
