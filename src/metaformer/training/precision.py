"""Number formats of a training step: autocast and, for fp16, gradient scaling."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum

import torch

from metaformer.errors import UserError


class PrecisionName(Enum):
    """Format of the matrix products; parameters, norms' statistics and the loss stay float32."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass
class PrecisionConfig:
    """AMP as in `torch.amp`."""

    name: PrecisionName = PrecisionName.bf16


class Precision:
    """One code path for all formats: where a format needs no scaling or casting, that part does nothing.

    Raises:
        UserError: the device cannot compute in this format.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        name = config.name
        if name is PrecisionName.fp16 and device.type == "cpu":
            raise UserError("precision=fp16: needs a GPU; use precision=fp32 or precision=bf16 on a CPU")
        if name is PrecisionName.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise UserError("precision=bf16: this GPU has no bfloat16 (Ampere and newer do); use precision=fp16")
        self._device = device
        self._dtype = torch.float16 if name is PrecisionName.fp16 else torch.bfloat16
        self._cast = name is not PrecisionName.fp32
        self.scaler = torch.amp.GradScaler(device.type, enabled=name is PrecisionName.fp16)

    def autocast(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        return torch.autocast(self._device.type, self._dtype, enabled=self._cast)
