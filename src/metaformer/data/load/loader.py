"""Interface of the loaders."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from metaformer.interfaces import Waiting


class Loader(Protocol):
    """Interface of a loader, which reads the batches of one plan.

    Attributes:
        waited: how long the consumer waited for the last batch, by stage.
    """

    waited: Waiting

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """Yield the images of the plan's batches from `first` on: uint8 [B, 3, S, S], on the CPU or the GPU.

        An error names the file that cannot be read or decoded.
        """

    def close(self) -> None:
        """Stop worker processes and free buffers."""
