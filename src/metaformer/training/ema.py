"""An exponential moving average of the weights, by timm. The paper trains without one."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from metaformer.training.config import EmaConfig


class WeightAverage(ModelEmaV3):  # type: ignore[misc]
    """timm's average of the weights, extended so that a skipped step does not change it."""

    @torch.no_grad()
    def update_where(self, taken: Tensor, model: nn.Module, step: int) -> None:
        """Move the average towards the weights if `taken`, a float32 scalar on the device, is 1; keep it if 0.

        Args:
            step: optimizer step, counted from 1.
        """
        decay = self.get_decay(step)
        if decay == 0:  # a copy; the weights are unchanged if the step was skipped
            self.set(model)
            return
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        averages = [average for average, _ in pairs if average.is_floating_point()]
        differences = torch._foreach_sub([now for _, now in pairs if now.is_floating_point()], averages)
        torch._foreach_mul_(differences, taken * (1 - decay))
        torch._foreach_add_(averages, differences)
        for average, current in pairs:
            if not average.is_floating_point():  # counts cannot be averaged
                average.copy_(current)


def make_ema(config: EmaConfig, model: nn.Module) -> WeightAverage | None:
    """Return an average that starts at the model's weights; None if it is disabled."""
    return WeightAverage(model, decay=config.decay, use_warmup=config.warmup) if config.enabled else None
