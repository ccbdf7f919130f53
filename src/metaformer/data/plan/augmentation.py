"""Configuration of the training augmentation."""

from dataclasses import dataclass, field
from enum import Enum

from metaformer.errors import UserError, check_at_least


class Interpolation(Enum):
    """Filter that resizes the training crop."""

    random = "random"  # bilinear or bicubic, drawn for each image
    bilinear = "bilinear"
    bicubic = "bicubic"


@dataclass
class RandAugmentConfig:
    """RandAugment as timm's `rand-m9-mstd0.5-inc1` (arXiv 1909.13719, with "increasing" operations)."""

    num_ops: int = 2  # operations drawn per image, with replacement, from 15; 0 turns RandAugment off
    probability: float = 0.5  # probability of applying a drawn operation
    magnitude: float = 9.0  # on a scale of 0 to 10
    magnitude_std: float = 0.5  # standard deviation of the magnitude, drawn for each operation


@dataclass
class AugmentationConfig:
    """Random augmentation of training images; the defaults are the paper's."""

    name: str = "paper"  # as shown in the log
    random_crop: bool = True  # False: resize and centre crop, as in evaluation
    min_area: float = 0.08  # minimum area of the random crop, as a share of the image's area
    max_area: float = 1.0  # maximum area of the random crop, as a share of the image's area
    min_aspect: float = 3 / 4  # minimum width / height of the random crop
    max_aspect: float = 4 / 3  # maximum width / height of the random crop
    interpolation: Interpolation = Interpolation.random  # the filter that resizes the crop
    flip_probability: float = 0.5  # probability of mirroring an image left to right
    randaugment: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    mixup_alpha: float = 0.8  # parameter of the beta distribution of mixup's share; 0 turns mixup off
    cutmix_alpha: float = 1.0  # parameter of the beta distribution of cutmix's area; 0 turns cutmix off
    mix_probability: float = 1.0  # probability of mixing a batch
    cutmix_probability: float = 0.5  # share of mixed batches that use cutmix, if both alphas are above 0
    mix_group_size: int | None = None  # images that share one mixing; None: each rank's batch, as in the paper's code
    label_smoothing: float = 0.1  # applied to the targets before they are mixed
    erase_probability: float = 0.25  # probability of filling a random rectangle of an image with noise
    # Views of an image in a batch, each with its own augmentation; an epoch uses 1/repeats of the images.
    repeats: int = 1

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is enabled."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def __post_init__(self) -> None:
        for name in (
            "flip_probability",
            "mix_probability",
            "cutmix_probability",
            "erase_probability",
            "label_smoothing",
        ):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"augmentation.{name}={value}: must be in [0, 1]")
        check_at_least(1, self, "repeats", prefix="augmentation.")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise UserError(f"augmentation.{name}={getattr(self, name)}: must be 0 (off) or positive")
        if not 0 < self.min_area <= self.max_area <= 1:
            raise UserError(
                f"augmentation.min_area={self.min_area}, max_area={self.max_area}: must be 0 < min <= max <= 1"
            )
        if not 0 < self.min_aspect <= self.max_aspect:
            raise UserError(
                f"augmentation.min_aspect={self.min_aspect}, max_aspect={self.max_aspect}: must be 0 < min <= max"
            )
        if self.mix_group_size is not None and (self.mix_group_size < 2 or self.mix_group_size % 2):
            raise UserError(f"augmentation.mix_group_size={self.mix_group_size}: must be an even number of at least 2")
