"""Interface of image readers, which worker processes call in two steps, so that each can be timed."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from metaformer.data.load.image_file import StoredImage
from metaformer.data.plan.plan import BatchPlan

Region = TypeVar("Region")


class ImageReader(ABC, Generic[Region]):
    """Interface of a reader that makes the images of a plan one by one. It is pickled for each worker process."""

    @abstractmethod
    def decode(self, stored: StoredImage, plan: BatchPlan, row: int) -> Region:
        """Decode the region of the plan's image at position `row` that is resized.

        Raises:
            OSError, ValueError, ...: one of BAD_FILE: the image cannot be decoded, or is too large.
        """

    @abstractmethod
    def augment(self, region: Region, plan: BatchPlan, row: int) -> Tensor:
        """Resize, flip and augment a region; return uint8 [3, S, S]."""

    def read(self, stored: StoredImage, plan: BatchPlan, row: int) -> Tensor:
        """Decode and augment an image; return uint8 [3, S, S]."""
        return self.augment(self.decode(stored, plan, row), plan, row)
