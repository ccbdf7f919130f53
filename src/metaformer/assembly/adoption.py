"""Completes a configuration with the network, parts and preprocessing that weights record; given values win."""

from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metaformer.assembly.parts import LocatedWeights, locate_weights
from metaformer.assembly.preprocessing import resolve_config
from metaformer.config import CommonConfig, ValidateConfig
from metaformer.errors import UserError, one_line, warn
from metaformer.models.composition import Composition
from metaformer.models.config import AUTO, DEFAULT_NETWORK, CropMode, Library, ModelConfig, Preprocessing
from metaformer.models.download import is_weights_name
from metaformer.models.preprocessing import resolve_preprocessing
from metaformer.models.record import MAX_LENGTH, Record, named_record, read_record, refuse_own_parts, refuse_target
from metaformer.runtime import Runtime
from metaformer.tracking.run_folder import parse_config

C = TypeVar("C", bound=CommonConfig)


class Adopted(NamedTuple, Generic[C]):
    """A configuration completed with the record of its weights.

    Attributes:
        notes: Lines about given values that differ from the recorded ones.
        record: The record of the weights' network, if there is one.
    """

    config: C
    notes: list[str]
    weights: LocatedWeights
    record: Record | None


def adopt_weights(config: C, field: str, source: str, use_ema: bool, runtime: Runtime) -> Adopted[C]:
    """Find weights, downloading released ones, and complete the configuration with their record.

    Args:
        field: The configuration field of `source`, for error messages.
        source: The weights as the user named them.
    """
    if is_weights_name(source) and config.model.name != AUTO:
        resolve_config(config, source, isinstance(config, ValidateConfig))  # a conflict is reported before a download
    weights = runtime.from_main(partial(locate_weights, field, source, use_ema))
    record = runtime.from_main(partial(find_record, source, weights.path))
    return Adopted(*adopt(config, record, source), weights, record)


def make_record(
    config: CommonConfig, images: Preprocessing, num_classes: int, classes: tuple[str, ...] | None
) -> Record:
    """Return the record of the configuration's network that is stored in weights files."""
    model = config.model
    record = Record(
        model.name, model.library, model.composition, num_classes, classes, images, model.target, model.options
    )
    if classes is not None and len(record.to_json()) > MAX_LENGTH:
        warn(f"checkpoints do not record the names of {len(classes):,} classes, which are too long")
        return replace(record, classes=None)
    return record


def find_record(source: str, weights: Path) -> Record | None:
    """Return the record of the weights' network, from their file, their run or their name.

    Args:
        source: The weights as the user named them.
        weights: Their file.
    """
    record = read_record(weights)
    if record is not None and record.images is not None:
        return record
    return find_run(source) or record or named_record(source)


def find_run(checkpoint: str) -> Record | None:
    """Return the record in config.yaml of the run that a run folder, a checkpoint or a file in a checkpoint belongs to.

    Earlier versions recorded the preprocessing only there.
    """
    folder = find_run_folder(checkpoint)
    if folder is None:
        return None
    file = folder / "config.yaml"
    try:
        values: Any = OmegaConf.create(parse_config(file.read_bytes()))
        model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values.model))
        image_size = values.image_size
        if image_size is not None and type(image_size) is not int:
            raise ValueError(f"image_size: {image_size!r} is not an integer")
        images = resolve_preprocessing(model, image_size, None, evaluation=False)
        return Record(
            model.name, model.library, model.composition, images=images, target=model.target, options=model.options
        )
    except (OSError, ValueError, TypeError, AttributeError, OmegaConfBaseException, UserError) as error:
        reason = one_line(error)
        raise UserError(f"{file}: not the configuration of a run ({reason}); give a weights file") from error


def find_run_folder(checkpoint: str) -> Path | None:
    """Return the run folder that a run folder, a checkpoint or a file in a checkpoint belongs to, or None."""
    path = Path(checkpoint).absolute()
    run_folders = [parent.parent for parent in (path.parent, path.parent.parent) if parent.name == "checkpoints"]
    for folder in (path, *run_folders):
        if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
            return folder
    return None


def adopt(config: C, record: Record | None, source: str) -> tuple[C, list[str]]:
    """Fill in missing values from the record; also return a line for each given value that differs from it.

    Weights to evaluate must be those of the given network, if one is given. A part outside this project must be given,
    not only recorded.

    Args:
        record: The record of the weights' network; None leaves the configuration unchanged.
        source: The weights as the user named them.
    """
    model, notes = config.model, list[str]()
    if model.name == AUTO:
        if record is not None:
            refuse_target(source, record)
        name, library = (DEFAULT_NETWORK, Library.metaformer) if record is None else (record.name, record.library)
        model = replace(model, name=name, library=library)
    if record is not None and (model.is_own or _is_same_network(model, record)):
        model, notes = _adopt_parts(model, record, source, evaluation=isinstance(config, ValidateConfig))
    elif record is not None and record.images is not None:  # otherwise it has only a name, and no library
        fix = {
            Library.metaformer: f"leave model= out, or give model={record.name}",
            Library.timm: f"leave model= out, or give model=timm model.name={record.name}",
            Library.target: f"give model.target={record.target}",
        }[record.library]
        if isinstance(config, ValidateConfig):
            raise UserError(f"model={model.name}: {source} is of {record.name}; {fix}")
        return replace(config, model=model), [f"model={model.name}: {source} is of {record.name}"]
    images = None if record is None else record.images
    if images is None:
        return replace(config, model=model), notes
    recorded = {name.removeprefix("model."): value for name, value in images.settings.items()}
    recorded |= {"interpolation": images.interpolation, "crop_mode": CropMode.center}
    image_size = recorded.pop("image_size")
    pairs = {"image_size": (config.image_size, image_size)}
    pairs |= {f"model.{name}": (getattr(model, name), value) for name, value in recorded.items()}
    for name, (given, trained) in pairs.items():
        if given is not None and given != trained:
            notes.append(f"{name}={_text(given)}: {source} was trained with {_text(trained)}")
    unset = {name: value for name, value in recorded.items() if getattr(model, name) is None}
    return replace(config, model=replace(model, **unset), image_size=config.image_size or image_size), notes


def _is_same_network(model: ModelConfig, record: Record) -> bool:
    """Return whether the names are the same, apart from the tag of timm's weights."""
    own, recorded = ((each.library, each.target, each.name.split(".")[0]) for each in (model, record))
    return own == recorded


def _adopt_parts(model: ModelConfig, record: Record, source: str, evaluation: bool) -> tuple[ModelConfig, list[str]]:
    """Fill in the parts of model=metaformer or the options of model.target."""
    if model.target is not None and record.target == model.target:
        notes = [
            f"model.options.{name}={_text(value)}: {source} was trained with {_text(record.options.get(name))}"
            for name, value in model.options.items()
            if value != record.options.get(name)
        ]
        return replace(model, options=record.options | model.options), notes
    parts = record.parts if model.is_own else None
    if parts is None:
        return model, []
    given, notes = model.given_parts, list[str]()
    for name, value in given.items():
        if not _is_same_part(parts, name, value):
            note = f"model.{name}={_text(value)}: {source} was trained with {_text(getattr(parts, name))}"
            if evaluation:
                raise UserError(f"{note}; remove the field")
            notes.append(note)
    names = [name for value in given.values() for name in (value if isinstance(value, tuple) else (value,))]
    refuse_own_parts(source, parts, tuple(name for name in names if isinstance(name, str)))
    unset: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(parts).items()
        if getattr(model, name) is None
    }
    return replace(model, **unset), notes


def _is_same_part(parts: Composition, name: str, value: Any) -> bool:
    try:
        return replace(parts, **{name: value}).canonical() == parts.canonical()
    except UserError:  # a value is incompatible with the other parts
        return False


def _text(value: Any) -> Any:
    """Return a value as it is written on the command line."""
    plain = list(value) if isinstance(value, tuple) else value
    return plain.value if isinstance(plain, Enum) else plain
