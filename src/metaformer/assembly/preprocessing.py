"""Resolves preprocessing from the configuration, the run that weights come from, and the network's defaults."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metaformer.config import CommonConfig, ValidateConfig
from metaformer.errors import UserError, one_line
from metaformer.models.config import CropMode, Library, ModelConfig, Preprocessing
from metaformer.models.preprocessing import resolve_preprocessing
from metaformer.models.record import read_record, refuse_own_parts
from metaformer.tracking.run_folder import parse_config

C = TypeVar("C", bound=CommonConfig)
FIELDS = ("crop_pct", "interpolation", "crop_mode", "mean", "std")  # fields of ModelConfig


@dataclass(frozen=True)
class TrainedRun:
    """The run that a checkpoint belongs to, and the preprocessing in its config.yaml."""

    folder: Path
    model: ModelConfig
    image_size: int | None


def resolve_config(config: C, weights: str | None, evaluation: bool = False) -> tuple[C, Preprocessing]:
    """Resolve the preprocessing; return it, and the configuration with its values filled in.

    Args:
        config: The configuration. A preprocessing field that is None takes the network's default.
        weights: The weights to load, as the user named them.
        evaluation: Whether the network is only evaluated.
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
    """Return the run that a run folder, a checkpoint or a file in a checkpoint belongs to, or None."""
    path = Path(checkpoint).absolute()
    run_folders = [parent.parent for parent in (path.parent, path.parent.parent) if parent.name == "checkpoints"]
    for folder in (path, *run_folders):
        file = folder / "config.yaml"
        if not ((folder / "checkpoints").is_dir() and file.is_file()):
            continue
        try:
            values: Any = OmegaConf.create(parse_config(file.read_bytes()))
            model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values.model))
            image_size = values.image_size
            if image_size is not None and type(image_size) is not int:
                raise ValueError(f"image_size: {image_size!r} is not an integer")
            return TrainedRun(folder, model, image_size)
        except (OSError, ValueError, TypeError, AttributeError, OmegaConfBaseException, UserError) as error:
            reason = one_line(error)
            raise UserError(f"{file}: not the configuration of a run ({reason}); give a weights file") from error
    return None


def adopt_preprocessing(config: ValidateConfig, run: TrainedRun) -> ValidateConfig:
    """Fill unset preprocessing fields with the run's values; raise `UserError` if the run trained another network."""
    if (config.model.library, config.model.name) != (run.model.library, run.model.name):
        is_timm = run.model.library is Library.timm
        fix = f"model=timm model.name={run.model.name}" if is_timm else f"model={run.model.name}"
        raise UserError(f"model={config.model.name}: {run.folder} trained {run.model.name}; give {fix}")
    unset = {name: getattr(run.model, name) for name in FIELDS if getattr(config.model, name) is None}
    image_size = run.image_size if config.image_size is None else config.image_size
    return replace(config, model=replace(config.model, **unset), image_size=image_size)


def adopt_parts(config: ValidateConfig, weights: Path) -> ValidateConfig:
    """Return the configuration with the parts of model=metaformer that the weights file records.

    Raises:
        UserError: a given part is not the recorded one, or the file names a part outside this project that is not
            given.
    """
    record = read_record(weights) if config.model.is_own else None
    recorded = None if record is None else record.parts
    if recorded is None:
        return config
    given = config.model.given_parts
    for name, value in given.items():
        if replace(recorded, **{name: value}).canonical() != recorded.canonical():
            trained = _enum_value(getattr(recorded, name))
            raise UserError(
                f"model.{name}={_enum_value(value)}: {weights} was trained with {trained}; remove the field"
            )
    names = [name for value in given.values() for name in (value if isinstance(value, tuple) else (value,))]
    refuse_own_parts(weights, recorded, tuple(name for name in names if isinstance(name, str)))
    values: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in vars(recorded).items()
    }
    return replace(config, model=replace(config.model, **values))


def describe_differences(config: ValidateConfig, run: TrainedRun) -> Iterator[str]:
    """Yield a line for each configured value that differs from the run's."""
    pairs = {f"model.{name}": (getattr(config.model, name), getattr(run.model, name)) for name in FIELDS}
    for name, (configured, trained) in ({"image_size": (config.image_size, run.image_size)} | pairs).items():
        if configured is not None and trained is not None and configured != trained:
            yield f"{name}={_enum_value(configured)}: {run.folder} was trained with {_enum_value(trained)}"


def _enum_value(value: Any) -> Any:
    plain = list(value) if isinstance(value, tuple) else value
    return plain.value if isinstance(plain, Enum) else plain
