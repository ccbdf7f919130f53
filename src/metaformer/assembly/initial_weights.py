"""Loads the weights from which training starts."""

from collections.abc import Iterator

from torch import nn

from metaformer.assembly.adoption import Adopted
from metaformer.config import TrainConfig
from metaformer.errors import warn
from metaformer.models import load_weights
from metaformer.models.classifier import load_weights_except_head
from metaformer.models.config import InitHead
from metaformer.models.position_embeddings import PositionResampling
from metaformer.models.pretraining import describe_missing, load_weights_of_21k
from metaformer.runtime import Runtime


def load_initial_weights(
    initial: Adopted[TrainConfig], model: nn.Module, classes: tuple[str, ...], runtime: Runtime
) -> Iterator[str]:
    """Load the weights of `init_weights`; yield lines about differences from their run, a new head and positions.

    Args:
        initial: The weights, and the configuration that they complete.
        classes: Names of the data set's classes.
    """
    yield from (f"differs      {note}" for note in initial.notes)
    head, path, record = initial.config.init_head, initial.weights.path, initial.record
    positions = PositionResampling(model)
    if head is InitHead.same:
        load_weights(model, path, convert=positions)
    elif head is InitHead.from_21k:
        missing = load_weights_of_21k(model, path, classes, positions)
        if missing:
            runtime.main_only(lambda: warn(f"init_head=from_21k: {describe_missing(missing)}"), None)
    else:
        renamed = record is not None and record.classes is not None and record.classes != classes
        new = load_weights_except_head(model, path, always=head is InitHead.new or renamed, prepare=positions)
        if new is not None:
            before = "the weights have none" if new.before is None else f"{new.before} -> {new.now} classes"
            others = head is InitHead.auto and new.before == new.now
            yield f"head         {before}, new"
            if others:
                yield "head         the weights' classes have other names; init_head=same keeps them"
    if positions.note:
        yield f"positions    {positions.note}"
