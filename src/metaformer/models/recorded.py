"""The network that a weights file records, so that it can be made again."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from metaformer.errors import UserError, printable
from metaformer.models.composition import Composition
from metaformer.models.families import COMPOSITIONS

ENTRY = "composition"  # in the file's metadata


def read_composition(path: Path) -> Composition | None:
    """Return the composition of the network that a file of this project holds weights of.

    Return None for all other files, and for damaged ones, which loading reports.

    Raises:
        UserError: the record cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    if ENTRY not in metadata:
        return COMPOSITIONS.get(metadata.get("model", ""))
    try:
        return Composition.from_json(metadata[ENTRY])
    except ValueError as error:
        raise UserError(f"{path}: cannot read which network it is of ({printable(str(error), 300)})") from error


def refuse_own_parts(path: Path, composition: Composition, given: tuple[str, ...] = ()) -> None:
    """Refuse parts outside this project that only a file names: code that a checkpoint names is never imported.

    Args:
        path: the file.
        composition: the network that it records.
        given: names of parts that the user has given.

    Raises:
        UserError: there are such parts.
    """
    unknown = [name for name in composition.own_parts if name not in given]
    if unknown:
        raise UserError(
            f"{path}: its network has the part {unknown[0]}, and code that only a file names is not imported; "
            "compose the network yourself, with the same fields as in training"
        )
