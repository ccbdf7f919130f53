"""The record of a network in a weights file: parts, classes and preprocessing, as JSON in the metadata."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open

from metaformer.errors import UserError, printable
from metaformer.models.composition import Composition
from metaformer.models.config import OWN_NETWORK, Library, Preprocessing, ResizeFilter
from metaformer.models.download import OFFICIAL, OFFICIAL_NAMES
from metaformer.models.families import COMPOSITIONS

ENTRY = "network"  # in the metadata
NAME_ENTRY, PARTS_ENTRY = "model", "composition"  # all that earlier versions wrote
TIMM_WEIGHTS = "hf:timm/"
MAX_LENGTH = 2**25  # characters of a record; safetensors refuses metadata of 100 MB
MAX_IMAGE_SIZE = 2**14  # pixels


@dataclass(frozen=True)
class Record:
    """The record of a network; None means not recorded.

    Attributes:
        name: one of `list_models()`, `metaformer` for a composed network, or a network of timm.
        composition: the parts of a network that the user composed.
        num_classes: number of outputs.
        classes: names of the first outputs, usually of all, in order.
        images: the preprocessing with which the network was trained and evaluated.
        target: `package.module:Class` of the user's own network; `name` is then the name of the class.
        options: the arguments of the target, besides the number of classes.
    """

    name: str
    library: Library = Library.metaformer
    composition: Composition | None = None
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    images: Preprocessing | None = None
    target: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as text; one that is longer than MAX_LENGTH cannot be read again."""
        return json.dumps(self.to_values())

    def to_values(self) -> dict[str, Any]:
        """Return the record as plain values for JSON."""
        images = self.images and {name.removeprefix("model."): value for name, value in self.images.settings.items()}
        return {
            "name": self.name,
            "library": self.library.value,
            "composition": self.composition and self.composition.to_values(),
            "num_classes": self.num_classes,
            "classes": self.classes,
            "images": images,
        } | ({} if self.target is None else {"target": self.target, "options": self.options})

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Parse the text of `to_json`, ignoring fields of later versions.

        Raises:
            ValueError: the text is not a record.
        """
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{len(text):,} characters, more than {MAX_LENGTH:,}")
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError("no object of JSON")
        composition, images = values.get("composition"), values.get("images")
        record = cls(
            _value(values, "name", str),
            Library(values.get("library")),
            None if composition is None else Composition.from_values(composition),
            None if values.get("num_classes") is None else _value(values, "num_classes", int),
            None if values.get("classes") is None else tuple(_value(values, "classes", list)),
            None if images is None else _preprocessing(images),
            None if values.get("target") is None else _value(values, "target", str),
            _value({"options": {}} | values, "options", dict),
        )
        record._check()
        return record

    @property
    def parts(self) -> Composition | None:
        """Return the parts of a network of this project; None for all others."""
        return self.composition or COMPOSITIONS[self.name] if self.library is Library.metaformer else None

    def _check(self) -> None:
        if self.library is Library.metaformer and self.composition is None and self.name not in COMPOSITIONS:
            raise ValueError(f"name={printable(self.name, 100)}: an unknown network")
        if (self.target is not None) != (self.library is Library.target):
            raise ValueError(f"target={printable(str(self.target), 100)}: not of library {self.library.value}")
        count, names = self.num_classes, self.classes or ()
        if count is not None and count < max(1, len(names)):
            raise ValueError(f"num_classes={count}: too few for {len(names)} names")
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("classes: not a list of different names")


def _value(values: dict[str, Any], name: str, kind: type) -> Any:
    """Return an entry; raise an error if it is not of the given type."""
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}={printable(str(value), 100)}: not of type {kind.__name__}")
    return value


def _preprocessing(values: Any) -> Preprocessing:
    if not isinstance(values, dict):
        raise ValueError("images: no object of JSON")
    colours = [tuple(_value(values, name, list)) for name in ("mean", "std")]
    numbers = [values.get("crop_pct"), *colours[0], *colours[1]]
    if not all(type(number) in (int, float) and 0 <= number <= 1 for number in numbers):
        raise ValueError("crop_pct, mean, std: not numbers in [0, 1]")
    images = Preprocessing(
        _value(values, "image_size", int), numbers[0], ResizeFilter(values.get("interpolation")), *colours
    )
    possible = 1 <= images.image_size <= MAX_IMAGE_SIZE
    if not possible or not images.crop_pct or [len(colour) for colour in colours] != [3, 3] or 0 in images.std:
        raise ValueError(f"images={printable(str(values), 200)}: not the preprocessing of a network")
    return images


def read_record(path: Path) -> Record | None:
    """Return the record in a safetensors file.

    Return None for files without a record, such as those of other programs, and for damaged files, which loading
    reports. Files of earlier versions record the name, and the parts of a network that the user composed.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    name, composition = metadata.get(NAME_ENTRY, ""), metadata.get(PARTS_ENTRY)
    try:
        if ENTRY in metadata:
            return Record.from_json(metadata[ENTRY])
        if composition is not None:
            return Record(OWN_NETWORK, composition=Composition.from_json(composition))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read which network it is of ({printable(str(error), 300)})") from error
    return Record(name) if name in COMPOSITIONS else None


def named_record(source: str) -> Record | None:
    """Return the record of a named network, such as `official:caformer_s18_384` or `hf:timm/resnet50.a1_in1k`."""
    if source.startswith(TIMM_WEIGHTS):
        name = source.removeprefix(TIMM_WEIGHTS)
        if name.split(".")[0] in COMPOSITIONS:
            return Record(name.split(".")[0])
        return Record(name, Library.timm) if timm.is_model(name) else None
    if not source.startswith(OFFICIAL):
        return None
    file = source.removeprefix(OFFICIAL)
    network = {official: network for network, official in OFFICIAL_NAMES.items()}.get(file, file)
    names = [name for name in COMPOSITIONS if network == name or network.startswith(f"{name}_")]
    return Record(max(names, key=len)) if names else None


def refuse_own_parts(source: Path | str, composition: Composition, given: tuple[str, ...] = ()) -> None:
    """Raise an error for parts outside this project that only a file names; code is never imported on a file's word.

    Args:
        source: the weights as the user named them.
        composition: the network that the weights record.
        given: names of the parts that the user has given.
    """
    unknown = [name for name in composition.own_parts if name not in given]
    if unknown:
        raise UserError(
            f"{source}: its network has the part {unknown[0]}, and code that only a file names is not imported; "
            "compose the network yourself, with the same fields as in training"
        )


def refuse_target(source: Path | str, record: Record, field: str = "model.target") -> None:
    """Raise an error for a user's own network that only a file names.

    Args:
        source: the weights as the user named them.
        record: the record of the weights.
        field: the configuration field that names the network.
    """
    if record.target is not None:
        raise UserError(
            f"{source}: its network is {record.target}, and code that only a file names is not imported; give "
            f"{field}={record.target} if you trust it"
        )
