"""An exponential moving average of the weights, by timm. The paper trains without."""

from dataclasses import dataclass

from timm.utils import ModelEmaV3
from torch import nn

from metaformer.errors import UserError


@dataclass
class EmaConfig:
    """After each optimizer step: average = decay * average + (1 - decay) * weights."""

    enabled: bool = False
    decay: float = 0.9999
    warmup: bool = False  # let the decay rise to its value, for short runs

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"ema.decay={self.decay}: must lie in [0, 1]")


def make_ema(config: EmaConfig, model: nn.Module) -> ModelEmaV3 | None:
    """The average, starting at the model's present weights; None where it is off."""
    return ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup) if config.enabled else None
