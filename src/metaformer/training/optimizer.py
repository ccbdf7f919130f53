"""Optimizers by name, from timm. Parameters with fewer than two dimensions are not decayed."""

from typing import Any

import timm.optim
import torch
from torch import nn

from metaformer.errors import UserError, one_line, unknown_name
from metaformer.training.config import Implementation, OptimizerConfig


def make_optimizer(config: OptimizerConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return an optimizer over the model's trainable parameters."""
    options: dict[str, Any] = {}
    if config.layer_decay is not None:
        options["layer_decay"] = config.layer_decay
    if config.betas is not None:
        options["betas"] = tuple(config.betas)
    if config.eps is not None:
        options["eps"] = config.eps
    if config.implementation is Implementation.apex:
        return _make_apex(config, model, lr, options)
    if config.name not in timm.optim.list_optimizers():
        raise unknown_name("optimizer.name", config.name, timm.optim.list_optimizers())
    if config.name in ("adamw", "adam", "sgd"):
        options["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            model, config.name, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum, **options
        )
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        reason = one_line(error)
        raise UserError(f"optimizer.name={config.name}: cannot be created with these options ({reason})") from error
    return optimizer


def _make_apex(config: OptimizerConfig, model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam, FusedLAMB
    except ImportError as error:
        raise UserError(
            "optimizer.implementation=apex: apex is not installed; NVIDIA's PyTorch image has it (see Dockerfile), "
            "or build it from github.com/NVIDIA/apex"
        ) from error
    known = {"adamw": FusedAdam, "lamb": FusedLAMB}
    if config.name not in known:
        raise unknown_name("optimizer.name (of apex)", config.name, known)
    decay = options.pop("layer_decay", None)
    if decay is None:
        groups = timm.optim.param_groups_weight_decay(model, config.weight_decay)
    else:
        groups = timm.optim.param_groups_layer_decay(model, config.weight_decay, layer_decay=decay)
    optimizer: torch.optim.Optimizer = known[config.name](groups, lr=lr, **options)
    return optimizer
