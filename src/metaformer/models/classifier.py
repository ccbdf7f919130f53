"""The classifier of a network: the layers with an output for each class, without the rest of the head."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from metaformer.errors import UserError
from metaformer.models.metaformer import MetaFormer
from metaformer.models.weight_formats import StateDict
from metaformer.models.weights import Convert, load_weights


class NewHead(NamedTuple):
    """A newly initialised classifier: its number of outputs, and that of the file or None if the file has none."""

    before: int | None
    now: int


def classifier_names(model: nn.Module, field: str = "init_head", fix: str = "init_head=same") -> tuple[str, ...]:
    """Return the names of the classifier's layers: one, or several in networks such as distilled ones.

    Networks of other libraries must name them as timm's do: `pretrained_cfg = {"classifier": NAME}`.

    Args:
        field: the option that needs the classifier, for the error message.
        fix: what to use instead, for the error message.
    """
    cfg: Any = {}
    if isinstance(model, MetaFormer):
        layers = [(name, layer) for name, layer in model.head.named_modules() if isinstance(layer, nn.Linear)]
        names = [f"head.{name}" for name, layer in layers if layer.out_features == model.num_classes][-1:]
    else:
        # timm's networks have the name in the configuration of their weights; the user's own may have it too.
        cfg = getattr(model, "pretrained_cfg", None)
        found: str | tuple[str, ...] | None = None if cfg is None else cfg.get("classifier")
        names = [found] if isinstance(found, str) else list(found or ())
    if not any(True for name in names for _ in model.get_submodule(name).parameters()):
        own = ", or name it by pretrained_cfg = {'classifier': NAME}" if cfg is None else ""
        raise UserError(f"{field}: {type(model).__name__} has no linear layer for its classes; give {fix}{own}")
    return tuple(names)


def load_weights_except_head(
    model: nn.Module, path: Path, always: bool = False, prepare: Convert = lambda state: state
) -> NewHead | None:
    """Load weights, except for the classifier if the file has another number of classes or no classifier.

    Everything else must match, as for `load_weights`.

    Args:
        always: never load the classifier.
        prepare: changes the state dict first.

    Returns:
        None if the classifier was loaded too.
    """
    prefixes = tuple(f"{name}." for name in classifier_names(model))
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(prefixes)}
    first = next(iter(own))
    change: NewHead | None = None

    def convert(state: StateDict) -> StateDict:
        nonlocal change
        state = prepare(state)
        in_file = {key: tensor for key, tensor in state.items() if key.startswith(prefixes)}
        before = in_file[first].shape[0] if first in in_file and in_file[first].ndim else None
        if not always and in_file and before in (None, own[first].shape[0]):
            return state
        change = NewHead(before, own[first].shape[0])
        return {key: tensor for key, tensor in state.items() if key not in in_file} | own

    load_weights(model, path, convert=convert)
    return change
