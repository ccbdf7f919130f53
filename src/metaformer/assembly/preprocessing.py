"""Preprocessing: resolved once, from what was given, the run that weights belong to, and the network's own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metaformer.config import CommonConfig, ValidateConfig
from metaformer.errors import UserError, one_line
from metaformer.models.config import CropMode, Library, ModelConfig
from metaformer.models.preprocessing import Preprocessing, resolve_preprocessing
from metaformer.models.recorded import read_composition, refuse_own_parts
from metaformer.tracking.run_folder import parse_config

C = TypeVar("C", bound=CommonConfig)
FIELDS = ("crop_pct", "interpolation", "crop_mode", "mean", "std")  # of ModelConfig


@dataclass(frozen=True)
class TrainedRun:
    """The run that a checkpoint belongs to, and what its config.yaml says of images."""

    folder: Path
    model: ModelConfig
    image_size: int | None


def resolve(config: C, weights: str | None, evaluation: bool = False) -> tuple[C, Preprocessing]:
    """Return what happens to images, and the configuration with these values, as a run folder records it.

    Args:
        config: null in a field of preprocessing means the network's own value.
        weights: what is loaded, as the user named it.
        evaluation: nothing is trained.

    Raises:
        UserError: see `resolve_preprocessing`.
    """
    images = resolve_preprocessing(config.model, config.image_size, weights, evaluation)
    model = replace(
        config.model,
        crop_pct=images.crop_pct,
        interpolation=images.interpolation,
        crop_mode=CropMode.center,
        mean=list(images.mean),
        std=list(images.std),
    )
    return replace(config, model=model, image_size=images.image_size), images


def find_run(checkpoint: str) -> TrainedRun | None:
    """Return the run of a run folder, of a checkpoint in one, or of a file of such a checkpoint; else None.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    path = Path(checkpoint).absolute()
    above = [parent.parent for parent in (path.parent, path.parent.parent) if parent.name == "checkpoints"]
    for folder in (path, *above):
        file = folder / "config.yaml"
        if not ((folder / "checkpoints").is_dir() and file.is_file()):
            continue
        try:
            values: Any = OmegaConf.create(parse_config(file.read_bytes()))
            model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values.model))
            image_size = values.image_size
            if image_size is not None and type(image_size) is not int:
                raise ValueError(f"image_size: {image_size!r} is no number of pixels")
            return TrainedRun(folder, model, image_size)
        except (OSError, ValueError, TypeError, AttributeError, OmegaConfBaseException, UserError) as error:
            reason = one_line(error)
            raise UserError(f"{file}: not the configuration of a run ({reason}); give a file of weights") from error
    return None


def adopt(config: ValidateConfig, run: TrainedRun) -> ValidateConfig:
    """Return the configuration with the run's preprocessing where none is given.

    Raises:
        UserError: the run trained another network.
    """
    if (config.model.library, config.model.name) != (run.model.library, run.model.name):
        timms = run.model.library is Library.timm
        mend = f"model=timm model.name={run.model.name}" if timms else f"model={run.model.name}"
        raise UserError(f"model={config.model.name}: {run.folder} trained {run.model.name}; give {mend}")
    unset = {name: getattr(run.model, name) for name in FIELDS if getattr(config.model, name) is None}
    image_size = run.image_size if config.image_size is None else config.image_size
    return replace(config, model=replace(config.model, **unset), image_size=image_size)


def adopt_parts(config: ValidateConfig, weights: Path) -> ValidateConfig:
    """Return the configuration with the parts of model=metaformer that the weights file records.

    Raises:
        UserError: a given part is not the recorded one, or the file names a part outside this project that is not
            given.
    """
    recorded = read_composition(weights) if config.model.is_own else None
    if recorded is None:
        return config
    given = config.model.given_parts
    for name, value in given.items():
        if replace(recorded, **{name: value}).canonical() != recorded.canonical():
            trained = _plain(getattr(recorded, name))
            raise UserError(
                f"model.{name}={_plain(value)}: {weights} has weights of a network with {trained}; leave the field out"
            )
    names = [name for value in given.values() for name in (value if isinstance(value, tuple) else (value,))]
    refuse_own_parts(weights, recorded, tuple(name for name in names if isinstance(name, str)))
    values: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(recorded).items()
    }
    return replace(config, model=replace(config.model, **values))


def differences(config: ValidateConfig, run: TrainedRun) -> Iterator[str]:
    """A line for each given value that is not the run's."""
    pairs = {f"model.{name}": (getattr(config.model, name), getattr(run.model, name)) for name in FIELDS}
    for name, (given, trained) in ({"image_size": (config.image_size, run.image_size)} | pairs).items():
        if given is not None and trained is not None and given != trained:
            yield f"{name}={_plain(given)}: {run.folder} was trained with {_plain(trained)}"


def _plain(value: Any) -> Any:
    plain = list(value) if isinstance(value, tuple) else value
    return plain.value if isinstance(plain, Enum) else plain
