"""Checks that all ranks have the same weights; otherwise data-parallel training is silently wrong."""

import torch
from torch import Tensor, nn

from metaformer.errors import Diverged
from metaformer.runtime import Runtime


def check_replicas(model: nn.Module, runtime: Runtime, step: int) -> None:
    """Compare a checksum of each parameter across the ranks; the result is the same on all of them.

    Raises:
        Diverged: names the first parameter that differs, and the rank.
    """
    names = [name for name, _ in model.named_parameters()]
    own = torch.stack([checksum(parameter) for parameter in model.parameters()])
    everyone = runtime.gather(own)
    for rank, other in enumerate(everyone):
        if not torch.equal(other, everyone[0]):
            name = names[int((other != everyone[0]).nonzero()[0])]
            raise Diverged(
                f"step {step}: {name} on rank {rank} is not what it is on rank 0; suspect that rank's memory or GPU; "
                "the same command resumes from the last checkpoint"
            )


def checksum(parameter: Tensor) -> Tensor:
    """Return a weighted sum of a parameter's values, with their bits read as integers: an int64 scalar on the device.

    Each position has its own odd weight, so that changing one value or swapping two values changes the sum.
    """
    bits = parameter.detach().reshape(-1).view(torch.int32).to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum()
