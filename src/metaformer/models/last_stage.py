"""Finds the part of a network whose output is its last feature map."""

from torch import nn

from metaformer.errors import UserError


def find_layer(model: nn.Module, name: str | None, option: str) -> nn.Module:
    """Return a part of a network by its name, such as `stages.2`; None selects the last stage.

    Args:
        option: the option that gives the name, for error messages.
    """
    if name is not None:
        try:
            return model.get_submodule(name)
        except AttributeError as error:
            known = ", ".join(child for child, _ in model.named_children())
            raise UserError(f"{option}={name}: no such part of the network, which consists of {known}") from error
    stages = _stages(model)
    if not stages:
        raise UserError(f"{option}: the last stage of {type(model).__name__} is not known; name it with this option")
    last = model.get_submodule(stages[-1])
    # Behind a transformer's last block only the class token is used; its first norm is the last place before.
    parts = dict(last.named_children())
    return parts["norm1"] if {"attn", "norm1"} <= parts.keys() else last


def other_layer(model: nn.Module, option: str) -> str:
    """Return the advice to name another part of a network, with the stage before the last as an example."""
    *earlier, _ = _stages(model) or [""]
    return f"name another part of the network with {option}" + (f", such as {earlier[-1]}" if earlier else "")


def _stages(model: nn.Module) -> list[str]:
    """Return the names of a network's stages, or of its blocks where it has no stages; [] if they are not known."""
    infos: list[dict[str, str]] = getattr(model, "feature_info", [])
    return [info["module"] for info in infos]
