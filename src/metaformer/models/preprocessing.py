"""How images are prepared for a network: as given, else as the paper or timm evaluates the network's weights."""

from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from metaformer.errors import UserError
from metaformer.models.config import CropMode, Library, ModelConfig, ResizeFilter
from metaformer.models.variants import find_architecture, find_timm_cfg

TIMM_WEIGHTS = "hf:timm/"
# The paper's networks are evaluated with crop_pct .9, and these with .95.
WIDER_CROP = {"poolformer_m36", "poolformer_m48", *(f"metaformer_s12_{mixers}" for mixers in ("pppa", "ppaa", "ppff"))}


@dataclass(frozen=True)
class Preprocessing:
    """What happens to every image of a network.

    Attributes:
        image_size: pixels, each side.
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
        """Plain values by the names that they have on the command line."""
        return {
            "image_size": self.image_size,
            "model.crop_pct": self.crop_pct,
            "model.interpolation": self.interpolation.value,
            "model.mean": list(self.mean),
            "model.std": list(self.std),
        }

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The mean as a pixel."""
        red, green, blue = (min(255, round(255 * value)) for value in self.mean)
        return red, green, blue

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{self.image_size} px, evaluated with crop {self.crop_pct:g} ({self.interpolation.value}), "
            f"mean {mean}, std {std}"
        )


def resolve_preprocessing(
    model: ModelConfig, image_size: int | None, weights: str | None, evaluation: bool
) -> Preprocessing:
    """Return given values, and the network's own where none are given.

    Networks of timm have another size and crop for evaluation at times. As timm's own programs do, `evaluation` takes
    these, and training takes the others; so does an evaluation at a given size that is not the one for evaluation.

    Args:
        model: names the network; its fields of preprocessing are given where they are not None.
        image_size: likewise.
        weights: what is loaded; `hf:timm/NAME.TAG` tells which of timm's weights of a network are meant.
        evaluation: nothing is trained.

    Raises:
        UserError: the network is unknown, or its images are prepared in a way that this project lacks.
    """
    if model.library is Library.timm:
        own = _timm_preprocessing(_tagged_name(model.name, weights), model, image_size, evaluation)
    else:
        own = paper_preprocessing(model.name)
    return Preprocessing(
        image_size=own.image_size if image_size is None else image_size,
        crop_pct=own.crop_pct if model.crop_pct is None else model.crop_pct,
        interpolation=own.interpolation if model.interpolation is None else model.interpolation,
        mean=own.mean if model.mean is None else tuple(model.mean),
        std=own.std if model.std is None else tuple(model.std),
    )


def paper_preprocessing(name: str) -> Preprocessing:
    """Return what the paper's program does to the images of one of `list_models()`.

    Raises:
        UserError: the name is unknown.
    """
    find_architecture(name)
    crop_pct = 0.95 if name in WIDER_CROP else 0.9
    return Preprocessing(224, crop_pct, ResizeFilter.bicubic, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _tagged_name(name: str, weights: str | None) -> str:
    """timm's name for a network with these weights: with the tag that they have in timm."""
    if weights is None or not weights.startswith(TIMM_WEIGHTS):
        return name
    tagged = weights.removeprefix(TIMM_WEIGHTS)
    if tagged.split(".")[0] != name.split(".")[0]:  # of another network: loading says so
        return name
    if "." in name and name != tagged:
        raise UserError(f"model.name={name}: {weights} are other weights; give model.name={tagged}")
    return tagged


def _timm_preprocessing(name: str, given: ModelConfig, image_size: int | None, evaluation: bool) -> Preprocessing:
    cfg = find_timm_cfg(name)
    for_evaluation = evaluation and image_size in (None, (cfg.test_input_size or cfg.input_size)[-1])
    wants = resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=for_evaluation)
    _, height, width = wants["input_size"]
    if image_size is None and height != width:
        raise UserError(
            f"image_size: timm's {name} takes images of {height} x {width} pixels, not square ones; give a size"
        )
    if given.crop_mode is None and wants["crop_mode"] not in CropMode.__members__:
        raise UserError(
            f"model.crop_mode: timm evaluates {name} with {wants['crop_mode']} crops, which this project lacks; "
            "give model.crop_mode=center to crop the center instead"
        )
    interpolation = given.interpolation or ResizeFilter.__members__.get(wants["interpolation"])
    if interpolation is None:
        raise UserError(
            f"model.interpolation: timm's {name} takes {wants['interpolation']}, which this project lacks; "
            f"give one of {', '.join(ResizeFilter.__members__)}"
        )
    return Preprocessing(width, wants["crop_pct"], interpolation, wants["mean"], wants["std"])
