"""What every loader is: a plan in, batches of images out."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from metaformer.data.load.image_file import MAX_PIXELS
from metaformer.errors import UserError


class LoaderName(Enum):
    """The loaders, fed by one plan: they read, crop, flip and augment a sample alike."""

    auto = "auto"  # dali on a GPU where DALI is installed, else torch
    dali = "dali"  # NVIDIA DALI: decodes on the GPU where there is one
    torch = "torch"  # torchvision's decoder and resize on uint8 tensors, in worker processes
    pil = "pil"  # PIL, the reference that published weights expect, in worker processes


@dataclass
class LoaderConfig:
    """How images are read."""

    name: LoaderName = LoaderName.auto
    max_pixels: int = MAX_PIXELS  # larger images are refused, before they are decoded
    prefetch_batches: int = 2  # batches read ahead, by each worker process or by DALI's pipeline
    # Share of JPEGs that DALI gives to the GPU's decoder unit, and sizes it reserves memory for (ImageNet's largest).
    hw_decoder_load: float = 0.65
    preallocate_width: int = 5980
    preallocate_height: int = 6430
    region_decode: bool = False  # on a GPU, decode only the region that is cropped; on a CPU DALI always does
    numa_affinity: bool = True  # where each rank's GPU has CPUs near it, and no launcher chose: keep the rank on them

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise UserError(f"loader.max_pixels={self.max_pixels}: must be at least 1")
        if self.prefetch_batches < 1:
            raise UserError(f"loader.prefetch_batches={self.prefetch_batches}: must be at least 1")


class Loader(Protocol):
    """Reads the batches of one plan."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """Images of the plan's batches from `first` on: uint8 [B, 3, S, S], on the CPU or already on the GPU.

        Raises:
            UserError: a file cannot be read or decoded; the message names it.
        """

    def close(self) -> None:
        """Stop worker processes and free buffers."""
