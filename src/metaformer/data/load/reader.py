"""What worker processes do with an image, in two steps, so that their time can be told apart."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from torch import Tensor

from metaformer.data.load.image_file import StoredImage
from metaformer.data.plan.plan import BatchPlan

Region = TypeVar("Region")


class ImageReader(ABC, Generic[Region]):
    """Makes the images of a plan, one by one. It is pickled for each worker process."""

    @abstractmethod
    def decode(self, stored: StoredImage, plan: BatchPlan, row: int) -> Region:
        """Decode what the plan's image at position `row` is resized from.

        Raises:
            OSError, ValueError, ...: one of BAD_FILE: the image cannot be decoded, or is too large.
        """

    @abstractmethod
    def augment(self, region: Region, plan: BatchPlan, row: int) -> Tensor:
        """Resize, flip and augment it; return uint8 [3, S, S]."""

    def read(self, stored: StoredImage, plan: BatchPlan, row: int) -> Tensor:
        """Do both."""
        return self.augment(self.decode(stored, plan, row), plan, row)
