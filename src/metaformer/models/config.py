"""The configuration of a network and of the images that it takes."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from metaformer.errors import UserError


class Library(Enum):
    """Whose networks a name belongs to."""

    metaformer = "metaformer"
    timm = "timm"


class ResizeFilter(Enum):
    """The filter that resizes images for evaluation."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class CropMode(Enum):
    """How evaluation makes an image square, by timm's name for it."""

    center = "center"  # resize the short side, then crop the center


@dataclass
class ModelConfig:
    """A network by name. Null in a field of preprocessing means what the network was made for."""

    name: str = MISSING
    library: Library = Library.metaformer
    drop_path_rate: float | None = None  # None: the paper's rate for this network, or timm's default
    # The paper's blocks by fused operators, where these pass a check; of library=metaformer, with channels_last.
    fused: bool = True
    crop_pct: float | None = None  # evaluation resizes the short side to image_size / crop_pct
    interpolation: ResizeFilter | None = None  # of evaluation; augmentation.interpolation is training's
    crop_mode: CropMode | None = None
    mean: list[float] | None = None  # of RGB values in [0, 1]
    std: list[float] | None = None

    def __post_init__(self) -> None:
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"model.crop_pct={self.crop_pct}: must lie in (0, 1]")
        if self.mean is not None and (len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean)):
            raise UserError(f"model.mean={self.mean}: must be three numbers in [0, 1], as in [0.5,0.5,0.5]")
        if self.std is not None and (len(self.std) != 3 or not all(0 < value <= 1 for value in self.std)):
            raise UserError(f"model.std={self.std}: must be three numbers in (0, 1], as in [0.5,0.5,0.5]")
