"""Preprocessing of images: the configured values, or those with which the paper or timm evaluates the weights."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from metaformer.errors import UserError
from metaformer.models.config import OWN_NETWORK, CropMode, Library, ModelConfig, Preprocessing, ResizeFilter
from metaformer.models.download import is_weights_name
from metaformer.models.families import BASELINES
from metaformer.models.record import TIMM_WEIGHTS
from metaformer.models.variants import find_architecture, find_timm_cfg

# Of the first paper, evaluated with crop_pct .95; its other networks with .9, those of the second paper with 1.
WIDER_CROP = {"poolformer_m36", "poolformer_m48", *(f"metaformer_s12_{mixers}" for mixers in ("pppa", "ppaa", "ppff"))}


def resolve_preprocessing(
    model: ModelConfig, image_size: int | None, weights: str | None, evaluation: bool
) -> Preprocessing:
    """Return the configured preprocessing, completed with the network's own values.

    Some of timm's networks have a separate size and crop for evaluation. As in timm's own programs, evaluation uses
    these and training uses the others. An evaluation at any other configured size uses the training values, too.

    Args:
        model: the network's name, and the preprocessing fields that override its own values where they are not None.
        image_size: side of the images in pixels; None takes the network's own.
        weights: the weights to load; `hf:timm/NAME.TAG` selects the preprocessing of these weights of timm.
        evaluation: the images are evaluated, not trained on.
    """
    if model.library is Library.timm:
        defaults = _timm_preprocessing(_tagged_name(model.name, weights), model, image_size, evaluation)
    else:
        defaults = paper_preprocessing(OWN_NETWORK if model.target else model.name, weights)
    return Preprocessing(
        image_size=defaults.image_size if image_size is None else image_size,
        crop_pct=defaults.crop_pct if model.crop_pct is None else model.crop_pct,
        interpolation=defaults.interpolation if model.interpolation is None else model.interpolation,
        mean=defaults.mean if model.mean is None else tuple(model.mean),
        std=defaults.std if model.std is None else tuple(model.std),
    )


def paper_preprocessing(name: str, weights: str | None = None) -> Preprocessing:
    """Return the preprocessing of the papers' programs.

    Args:
        name: one of `list_models()`, or `metaformer` for a composed network.
        weights: the weights to load; `official:` or `hf:` and a name with `_384` are weights for 384 px.
    """
    if name != OWN_NETWORK:
        find_architecture(name)
    crop_pct = 1.0 if name in BASELINES else 0.95 if name in WIDER_CROP else 0.9
    of_384 = weights is not None and is_weights_name(weights) and "_384" in weights
    size = 384 if of_384 else 224
    return Preprocessing(size, crop_pct, ResizeFilter.bicubic, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _tagged_name(name: str, weights: str | None) -> str:
    """Return timm's name of a network with the tag of these weights, if they come from timm."""
    if weights is None or not weights.startswith(TIMM_WEIGHTS):
        return name
    tagged = weights.removeprefix(TIMM_WEIGHTS)
    if tagged.split(".")[0] != name.split(".")[0]:  # weights of another network: loading reports it
        return name
    if "." in name and name != tagged:
        raise UserError(f"model.name={name}: conflicts with {weights}; set model.name={tagged}")
    return tagged


def _timm_preprocessing(name: str, model: ModelConfig, image_size: int | None, evaluation: bool) -> Preprocessing:
    cfg = find_timm_cfg(name)
    for_evaluation = evaluation and image_size in (None, (cfg.test_input_size or cfg.input_size)[-1])
    data_config = resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=for_evaluation)
    _, height, width = data_config["input_size"]
    if image_size is None and height != width:
        raise UserError(
            f"image_size: timm's {name} takes images of {height} x {width} pixels, which are not square; set image_size"
        )
    if model.crop_mode is None and data_config["crop_mode"] not in CropMode.__members__:
        raise UserError(
            f"model.crop_mode: timm evaluates {name} with {data_config['crop_mode']} crops, which are not supported; "
            "set model.crop_mode=center to crop the center instead"
        )
    interpolation = model.interpolation or ResizeFilter.__members__.get(data_config["interpolation"])
    if interpolation is None:
        raise UserError(
            f"model.interpolation: timm's {name} uses {data_config['interpolation']}, which is not supported; "
            f"set one of {', '.join(ResizeFilter.__members__)}"
        )
    return Preprocessing(width, data_config["crop_pct"], interpolation, data_config["mean"], data_config["std"])
