"""Number formats of a training step: autocast, gradient scaling, and skipping of steps with non-finite gradients."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from metaformer.errors import UserError
from metaformer.training.config import PrecisionConfig, PrecisionName
from metaformer.training.undo import UndoableStep


class Scaler(torch.amp.GradScaler):
    """torch's GradScaler, which skips an optimizer step if its gradients are not all finite.

    Gradients are averaged over the ranks first, so one rank's NaN reaches every rank and all of them skip the step.
    Fused optimizers decide on the device; for others, `UndoableStep` does. The host does not wait for the decision.
    """

    def __init__(self, device: str, init_scale: float = 2.0**16) -> None:
        super().__init__(device, init_scale=init_scale)
        self._undoable: dict[int, UndoableStep] = {}

    def finish_step(self) -> None:
        """Complete the last step. Call it before the optimizer's state is read."""
        for step in self._undoable.values():
            step.finish()

    def _maybe_opt_step(self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *_: Any) -> None:
        """Override torch's method, which waits for the device if an optimizer cannot skip a step there."""
        found: list[Tensor] = list(optimizer_state["found_inf_per_device"].values())
        self._undoable.setdefault(id(optimizer), UndoableStep(optimizer)).take(found[0])

    def skipped(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Return 1 if the last step was skipped, else 0: a float32 scalar on the device. Call it before `update`."""
        found: list[Tensor] = list(self._found_inf_per_device(optimizer).values())
        return found[0].clamp(max=1)


class UnitScaler(Scaler):
    """A scaler for formats that need no scaling: its factor is always 1."""

    def __init__(self, device: str) -> None:
        super().__init__(device, init_scale=1.0)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(1.0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing: a run that switches away from fp16 drops its factor."""


class Precision:
    """Autocast and gradient scaler of a format; whichever the format does not need does nothing.

    The constructor also sets, for the whole process, how GPUs multiply float32, and restricts cuDNN to deterministic
    algorithms.

    Attributes:
        dtype: the type of matrix products; None for float32.
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
        """Return the context manager for a forward pass."""
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype is not None)

    @property
    def inference_dtype(self) -> torch.dtype | None:
        """The type of matrix products of a network that is not trained: bfloat16 on GPUs that have it, else `dtype`."""
        if self._device.type == "cuda" and torch.cuda.is_bf16_supported(False):
            return torch.bfloat16
        return self.dtype

    def inference_autocast(self) -> AbstractContextManager[None]:
        """Return the context manager for the forward pass of a network that is not trained."""
        dtype = self.inference_dtype
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)
