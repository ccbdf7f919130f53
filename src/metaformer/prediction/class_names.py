"""Names of a network's outputs: those that its weights record, or ImageNet's."""

from collections.abc import Sequence
from dataclasses import dataclass

from timm.data import ImageNetInfo, infer_imagenet_subset

from metaformer.wnids import describe_wnids


@dataclass(frozen=True)
class ClassNames:
    """Names of all outputs of a network, in order.

    Attributes:
        names: as recorded, wnids of ImageNet, or numbers from 0.
        descriptions: descriptions of the wnids; None for other names.
        origin: origin of the names, for messages.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...] | None
    origin: str

    def text(self, label: int) -> str:
        """Return the name of a class with its description, if it has one."""
        return self.names[label] if self.descriptions is None else self.descriptions[label]


def find_class_names(recorded: Sequence[str] | None, outputs: int) -> ClassNames:
    """Return names for the outputs of a network.

    Args:
        recorded: names of the first outputs, if the weights record any; the others have numbers.
        outputs: number of outputs of the network.
    """
    if recorded:
        names = (*recorded, *map(str, range(len(recorded), outputs)))
        rest = f"; {outputs - len(recorded):,} more have only numbers" if outputs > len(recorded) else ""
        return ClassNames(names, describe_wnids(names), f"{len(recorded):,} names from the weights{rest}")
    subset = infer_imagenet_subset({"num_classes": outputs})  # timm's sets differ in their number of classes
    if subset is None:
        origin = f"{outputs:,} numbers: the weights record no names"
        return ClassNames(tuple(map(str, range(outputs))), None, origin)
    names = tuple(ImageNetInfo(subset).label_names())
    return ClassNames(
        names, describe_wnids(names), f"the weights record no names; taken for timm's {outputs:,} of {subset}"
    )
