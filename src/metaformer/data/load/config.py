"""Configuration of the loaders."""

from dataclasses import dataclass
from enum import Enum

from metaformer.data.load.limits import MAX_PIXELS
from metaformer.errors import UserError


class LoaderName(Enum):
    """Available loaders; with the same plan, they read, crop, flip and augment a sample in the same way."""

    auto = "auto"  # dali on a GPU if DALI is installed, otherwise torch
    dali = "dali"  # NVIDIA DALI; decodes on the GPU if there is one
    torch = "torch"  # libjpeg-turbo's pixels and torch's resize on uint8 tensors, in worker processes
    pil = "pil"  # PIL in worker processes; the reference that published weights expect


class DecodeMode(Enum):
    """Decoding of training images."""

    exact = "exact"  # PIL's pixels
    scaled = "scaled"  # large crops at 1/2, 1/4 or 1/8 if they are reduced by more; loader=torch only


@dataclass
class LoaderConfig:
    """Settings of a loader."""

    name: LoaderName = LoaderName.auto  # reads and decodes images; all loaders give the same crops
    max_pixels: int = MAX_PIXELS  # larger images are rejected before they are decoded
    decode: DecodeMode = DecodeMode.exact  # validation is always exact
    prefetch_batches: int = 2  # batches read ahead by each worker process, or by DALI's pipeline
    hw_decoder_load: float = 0.65  # share of JPEGs that DALI sends to the GPU's hardware decoder
    preallocate_width: int = 5980  # largest width for which DALI's decoder reserves memory: ImageNet's
    preallocate_height: int = 6430  # largest height for which DALI's decoder reserves memory: ImageNet's
    region_decode: bool = False  # on a GPU, decode only the cropped region, as DALI always does on a CPU
    check_decoding: bool = True  # on a GPU, decode a batch twice at the start, and stop if the pixels differ
    numa_affinity: bool = True  # bind each rank to the CPUs near its GPU, unless a launcher has chosen CPUs

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise UserError(f"loader.max_pixels={self.max_pixels}: must be at least 1")
        if self.prefetch_batches < 1:
            raise UserError(f"loader.prefetch_batches={self.prefetch_batches}: must be at least 1")
