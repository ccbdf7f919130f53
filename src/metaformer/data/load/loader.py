"""Interface of the loaders."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from metaformer.interfaces import Waiting


class Loader(Protocol):
    """Interface of a loader, which reads the batches of one plan.

    Attributes:
        waited: how long the consumer waited for the last batch, and for what.
    """

    waited: Waiting

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """Yield the images of the plan's batches from `first` on: uint8 [B, 3, S, S], on the CPU or the GPU.

        Raises:
            UserError: a file cannot be read or decoded; the message names it.
        """

    def close(self) -> None:
        """Stop worker processes and free buffers."""
