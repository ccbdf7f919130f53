"""Configuration of a run's report."""

import math
from dataclasses import dataclass

from metaformer.errors import UserError


@dataclass
class ReportConfig:
    """Configuration of RUN/report.html."""

    enabled: bool = True  # write it after each validation and at the end, in a process of its own
    price_per_hour: float | None = None  # price of a GPU, or of a process without GPUs, in any currency; adds the cost

    def __post_init__(self) -> None:
        price = self.price_per_hour
        if price is not None and not 0 <= price < math.inf:
            raise UserError(f"report.price_per_hour={price:g}: must be a price of 0 or more")
