"""Number formats of a training step: autocast, gradient scaling for fp16, no step on gradients that are not finite."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from metaformer.errors import UserError
from metaformer.training.undo import UndoableStep


class PrecisionName(Enum):
    """Format of the matrix products; parameters, norms' statistics and the loss stay float32."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass
class PrecisionConfig:
    """AMP as in `torch.amp`."""

    name: PrecisionName = PrecisionName.bf16
    # Let GPUs round the inputs of float32 products to TF32's 10 bits, in matrix products and convolutions alike.
    tf32: bool = False
    reduce_in_bf16: bool = False  # average gradients over the ranks in bfloat16: half the bytes on the network


class Scaler(torch.amp.GradScaler):
    """torch's scaler, which leaves out an optimizer step whose gradients are not all finite.

    Gradients are averaged over the ranks before, so that one rank's NaN is every rank's and all leave out the step.
    The decision is made on the device, by fused optimizers themselves and for others by `UndoableStep`: the host does
    not wait for it.
    """

    def __init__(self, device: str, init_scale: float = 2.0**16) -> None:
        super().__init__(device, init_scale=init_scale)
        self._undoable: dict[int, UndoableStep] = {}

    def settle(self) -> None:
        """Complete what steps left to do, before the state of their optimizers is read."""
        for step in self._undoable.values():
            step.settle()

    def _maybe_opt_step(self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *_: Any) -> None:
        """Called by `step` for optimizers that cannot leave out a step on the device; torch's own waits for it."""
        found: list[Tensor] = list(optimizer_state["found_inf_per_device"].values())
        self._undoable.setdefault(id(optimizer), UndoableStep(optimizer)).take(found[0])

    def skipped(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """1 if the step just taken was left out, else 0: float32 scalar on the device. Before `update`."""
        found: list[Tensor] = list(self._found_inf_per_device(optimizer).values())
        return found[0].clamp(max=1)


class UnitScaler(Scaler):
    """For formats that need no scaling: the factor is always 1."""

    def __init__(self, device: str) -> None:
        super().__init__(device, init_scale=1.0)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(1.0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to load; a run that goes on from fp16 leaves its factor behind."""


class Precision:
    """One code path for all formats: where a format needs no scaling or casting, that part does nothing.

    Also sets, for the whole process, how GPUs multiply float32 and that cuDNN only uses algorithms that repeat their
    results.

    Attributes:
        dtype: of matrix products; None for float32.

    Raises:
        UserError: the device cannot compute in this format.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        name = config.name
        if name is PrecisionName.fp16 and device.type == "cpu":
            raise UserError("precision=fp16: needs a GPU; use precision=fp32 or precision=bf16 on a CPU")
        if name is PrecisionName.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise UserError("precision=bf16: this GPU has no bfloat16 (Ampere and newer do); use precision=fp16")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        torch.backends.cudnn.deterministic = True
        self._device = device
        self.dtype = {PrecisionName.bf16: torch.bfloat16, PrecisionName.fp16: torch.float16}.get(name)
        self.scaler = Scaler(device.type) if name is PrecisionName.fp16 else UnitScaler(device.type)

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype is not None)
