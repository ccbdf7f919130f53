"""Freezes a part of a network: its parameters get no gradient, and its BatchNorms keep their running statistics."""

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaformer.errors import UserError
from metaformer.models.classifier import classifier_names
from metaformer.models.config import ALL_BUT_HEAD, STEM


def freeze(model: nn.Module, part: str) -> list[nn.Module]:
    """Freeze a part, and return the BatchNorms in it, which must stay in evaluation mode.

    Args:
        model: the network; changed in place.
        part: `stem`; `stages:N`, which is the stem and the first N stages (of timm's networks without stages, such as
            ViT, the first N blocks); or `all_but_head`, which trains only the classifier.
    """
    frozen = _parameter_names(model, part)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.weight is not None and not norm.weight.requires_grad]


def _parameter_names(model: nn.Module, part: str) -> set[str]:
    if part == ALL_BUT_HEAD:
        head = tuple(
            f"{name}." for name in classifier_names(model, f"model.freeze={ALL_BUT_HEAD}", f"{STEM} or stages:N")
        )
        return {name for name, _ in model.named_parameters() if not name.startswith(head)}
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(f"model.freeze={part}: {type(model).__name__} does not name its stages; give {ALL_BUT_HEAD}")
    groups = group_parameters(model, matcher(coarse=True))  # the stem, each stage, and the head
    stages = 0 if part == STEM else int(part.partition(":")[2])
    if stages > len(groups) - 2:
        raise UserError(f"model.freeze={part}: {type(model).__name__} has {len(groups) - 2} stages")
    return {name for group in range(stages + 1) for name in groups[group]}
