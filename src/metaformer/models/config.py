"""Configuration of a network and of its input images."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from metaformer.errors import UserError


class Library(Enum):
    """The library that a network name belongs to."""

    metaformer = "metaformer"
    timm = "timm"


class ResizeFilter(Enum):
    """The filter that resizes images for evaluation."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class CropMode(Enum):
    """The evaluation crop that makes an image square, by timm's name."""

    center = "center"  # resize the short side, then crop the center


@dataclass
class ModelConfig:
    """A network and its preprocessing; a preprocessing field that is null takes the network's own value."""

    name: str = MISSING
    library: Library = Library.metaformer
    drop_path_rate: float | None = None  # None: the paper's rate for this network, or timm's default
    # Run the paper's blocks with fused operators where these pass a check; needs library=metaformer and channels_last.
    fused: bool = True
    crop_pct: float | None = None  # evaluation resizes the short side to image_size / crop_pct
    interpolation: ResizeFilter | None = None  # for evaluation; augmentation.interpolation is for training
    crop_mode: CropMode | None = None
    mean: list[float] | None = None  # of RGB values in [0, 1]
    std: list[float] | None = None

    def __post_init__(self) -> None:
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"model.crop_pct={self.crop_pct}: must be in (0, 1]")
        if self.mean is not None and (len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean)):
            raise UserError(f"model.mean={self.mean}: must be three numbers in [0, 1], such as [0.5,0.5,0.5]")
        if self.std is not None and (len(self.std) != 3 or not all(0 < value <= 1 for value in self.std)):
            raise UserError(f"model.std={self.std}: must be three numbers in (0, 1], such as [0.5,0.5,0.5]")
