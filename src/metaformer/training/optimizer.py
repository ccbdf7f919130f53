"""Optimizers by name, from timm. Parameters with fewer than two dimensions are not decayed."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import timm.optim
import torch
from torch import nn

from metaformer.errors import UserError, one_line, unknown_name


class Implementation(Enum):
    """The library whose code runs the update."""

    torch = "torch"
    apex = "apex"


@dataclass
class OptimizerConfig:
    """The defaults are the paper's: AdamW, lr = 1e-3 * global batch / 1024."""

    name: str = "adamw"  # any of timm.optim.list_optimizers()
    lr: float | None = None  # None: base_lr * global_batch_size / base_batch_size
    base_lr: float = 1e-3
    base_batch_size: int = 1024
    weight_decay: float = 0.05
    betas: list[float] | None = None  # None: the optimizer's own
    eps: float | None = None
    momentum: float = 0.9  # used by optimizers that have one
    implementation: Implementation = Implementation.torch

    def __post_init__(self) -> None:
        if self.betas is not None and len(self.betas) != 2:
            raise UserError(f"optimizer.betas={self.betas}: must be two numbers, as in [0.9,0.999]")

    def learning_rate(self, global_batch_size: int) -> float:
        """Return the peak learning rate."""
        return self.base_lr * global_batch_size / self.base_batch_size if self.lr is None else self.lr


def make_optimizer(config: OptimizerConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return an optimizer over the model's trainable parameters.

    Raises:
        UserError: the name or an option is unknown, or apex is not installed.
    """
    options: dict[str, Any] = {}
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
    groups = timm.optim.param_groups_weight_decay(model, config.weight_decay)
    optimizer: torch.optim.Optimizer = known[config.name](groups, lr=lr, **options)
    return optimizer
