"""Configuration of a network and of its input images."""

import re
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import MISSING

from metaformer.errors import UserError
from metaformer.models.composition import Composition
from metaformer.targets import check_target

OWN_NETWORK = "metaformer"  # model.name of a network that the user composes
AUTO = "auto"  # model.name of the network that the weights record
DEFAULT_NETWORK = "poolformer_s12"  # used if the weights record none
STEM, ALL_BUT_HEAD = "stem", "all_but_head"  # choices of model.freeze, besides stages:N
RATES = ("drop_path_rate", "head_dropout")  # fields of a composition that named networks have too


class Library(Enum):
    """The library that a network name belongs to."""

    metaformer = "metaformer"
    timm = "timm"
    target = "target"  # model.target, code of the user's own


class ResizeFilter(Enum):
    """The filter that resizes images for evaluation."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class CropMode(Enum):
    """The evaluation crop that makes an image square, by timm's name."""

    center = "center"  # resize the short side, then crop the center


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a network's images.

    Attributes:
        image_size: side of the square image, in pixels.
        crop_pct: evaluation resizes the short side to image_size / crop_pct, then crops the center.
        interpolation: the filter of that resize.
        mean, std: of RGB values in [0, 1].
    """

    image_size: int
    crop_pct: float
    interpolation: ResizeFilter
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The values, keyed by their names on the command line."""
        return {
            "image_size": self.image_size,
            "model.crop_pct": self.crop_pct,
            "model.interpolation": self.interpolation.value,
            "model.mean": list(self.mean),
            "model.std": list(self.std),
        }

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The mean as an RGB pixel, 0 to 255."""
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue

    @property
    def lines(self) -> tuple[str, str]:
        """The values as lines of a log."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"images       {self.image_size} px, evaluated with crop {self.crop_pct:g} ({self.interpolation.value})",
            f"images       mean {mean}, std {std}",
        )


class InitHead(Enum):
    """Treatment of the classifier of `init_weights`; everything else must match."""

    auto = "auto"  # kept if the classes are the same, else a new one
    same = "same"  # kept; another number of classes is an error
    new = "new"  # a new one in any case
    from_21k = "from_21k"  # taken from the 21,841 classes of ImageNet-21K, by wnid


@dataclass
class ModelConfig:
    """A network and its preprocessing.

    A preprocessing field that is null takes the network's own value. The fields from `depths` on are for
    model=metaformer, a network that the user composes; null takes PoolFormer-S12's value. See `Composition`.
    """

    name: str = MISSING  # a network of this project or of timm; auto: the one that the weights record
    library: Library = Library.metaformer  # library that has the network; model=timm sets it
    target: str | None = None  # package.module:Class of a network of your own, called with num_classes and options
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of target, as in model.options.width=64
    drop_path_rate: float | None = None  # None: the paper's rate for this network, or timm's default
    # Use the fused Triton kernels on GPUs, for the paper's blocks, if they pass a check; needs channels_last.
    fused: bool = True
    freeze: str | None = None  # stem, stages:N (the stem and the first N stages) or all_but_head; for train.py
    crop_pct: float | None = None  # evaluation resizes the short side to image_size / crop_pct
    interpolation: ResizeFilter | None = None  # for evaluation; augmentation.interpolation is for training
    crop_mode: CropMode | None = None  # for evaluation; null: the network's, which must be center
    mean: list[float] | None = None  # mean of RGB values in [0, 1]
    std: list[float] | None = None  # standard deviation of RGB values in [0, 1]
    head_dropout: float | None = None  # for networks with an MLP head; None: the paper's rate for this network
    depths: list[int] | None = None  # blocks of each stage of model=metaformer
    dims: list[int] | None = None  # channels of each stage
    token_mixers: list[str] | None = None  # names of token_mixers.py or package.module:Class, one per stage or one
    norm: str | None = None  # the blocks' norm: group_norm, layer_norm, batch_norm, none, ... or package.module:Class
    activation: str | None = None  # gelu, relu, silu, squared_relu, star_relu or package.module:Class
    channel_mlps: list[str] | None = None  # conv, linear, either _without_bias, or none; one per stage or one
    residuals: list[str] | None = None  # plain, scaled or none; one per stage or one
    layer_scale: float | None = None  # initial value; 0: without LayerScale
    downsampling_norm: str | None = None  # after the stem's convolution and before those between stages, as norm
    head: str | None = None  # norm_first, linear, mlp or package.module:Class
    position_embedding_stage: int | None = None  # the stage that adds one before its blocks, counted from 0
    initialization: str | None = None  # layers that start as a truncated normal distribution: mlps_and_head, or all

    @property
    def is_own(self) -> bool:
        """Whether this is a network that the user composes."""
        return self.library is Library.metaformer and self.name == OWN_NETWORK

    @property
    def given_parts(self) -> dict[str, Any]:
        """The given fields of a composition, without RATES."""
        names = [part.name for part in fields(Composition) if part.name not in RATES]
        values = {name: getattr(self, name) for name in names}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }

    @property
    def composition(self) -> Composition | None:
        """The parts of a network that the user composes; None for all others."""
        if not self.is_own:
            return None
        rates = {name: getattr(self, name) for name in RATES if getattr(self, name) is not None}
        return Composition(**self.given_parts, **rates)

    @property
    def own_code(self) -> list[str]:
        """The classes and functions of the user's own, each as package.module:Class."""
        parts = [] if self.composition is None else self.composition.own_parts
        return parts if self.target is None else [self.target]

    def __post_init__(self) -> None:
        self._set_target()
        if self.composition is None and self.given_parts:
            name = next(iter(self.given_parts))
            raise UserError(
                f"model.{name}={getattr(self, name)}: model={self.name} has its own parts; "
                f"give model={OWN_NETWORK} to compose a network"
            )
        if self.freeze is not None and not re.fullmatch(rf"{STEM}|{ALL_BUT_HEAD}|stages:[1-9]\d?", self.freeze):
            raise UserError(f"model.freeze={self.freeze}: must be {STEM}, {ALL_BUT_HEAD} or stages:N, as in stages:2")
        if self.head_dropout is not None and self.library is Library.timm:
            raise UserError(f"model.head_dropout={self.head_dropout}: timm's networks have none here; leave it null")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"model.crop_pct={self.crop_pct}: must be in (0, 1]")
        if self.mean is not None and (len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean)):
            raise UserError(f"model.mean={self.mean}: must be three numbers in [0, 1], such as [0.5,0.5,0.5]")
        if self.std is not None and (len(self.std) != 3 or not all(0 < value <= 1 for value in self.std)):
            raise UserError(f"model.std={self.std}: must be three numbers in (0, 1], such as [0.5,0.5,0.5]")

    def _set_target(self) -> None:
        """Name the network after its class, and reject options that do not apply to the user's own network."""
        if self.target is None:
            given = "model.library=target" if self.library is Library.target else f"model.options={self.options}"
            if self.library is Library.target or self.options:
                raise UserError(f"{given}: belongs to a network of your own; give model.target=package.module:Class")
            return
        check_target("model.target", self.target)
        name = re.split("[:.]", self.target)[-1]
        if self.library is Library.timm or self.name not in (AUTO, name):
            raise UserError(f"model.target={self.target}: is a network of its own; leave model={self.name} out")
        for rate in RATES:
            if getattr(self, rate) is not None:
                raise UserError(f"model.{rate}={getattr(self, rate)}: not an option of model.target; give "
                                f"model.options.{rate}={getattr(self, rate)} if {name} has it")  # fmt: skip
        self.name, self.library = name, Library.target
