"""Token mixers: the part of a MetaFormer block that lets positions of an image exchange information."""

import torch
from torch import Tensor, nn

from metaformer.errors import UserError


class Pooling(nn.Module):
    """PoolFormer's token mixer: the average over a window, minus the input (the block's residual adds it back).

    Padding is not counted in the average (paper, section 3.2), so a constant image maps to zero everywhere.
    Shapes: [B, C, H, W] -> [B, C, H, W].
    """

    def __init__(self, dim: int, pool_size: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(x)
        return pooled - x


def check_pooling(device: torch.device) -> None:
    """Compare the pooling's gradient for channels_last input with the CPU's, for contiguous input.

    Some releases of torch compute it wrongly on CUDA (pytorch issue 188344).

    Raises:
        UserError: they differ.
    """

    def gradient(on: torch.device, memory_format: torch.memory_format) -> Tensor:
        values = torch.arange(2 * 8 * 7 * 7, dtype=torch.float32, device=on).view(2, 8, 7, 7).sin()
        x = values.clone(memory_format=memory_format).requires_grad_()
        (Pooling(8)(x) * values.flip(0).contiguous(memory_format=memory_format)).sum().backward()
        assert x.grad is not None
        return x.grad.cpu()

    expected = gradient(torch.device("cpu"), torch.contiguous_format)
    if not torch.allclose(gradient(device, torch.channels_last), expected, atol=1e-4):
        raise UserError(
            f"channels_last=true: torch {torch.__version__} computes the gradient of average pooling wrongly on this "
            "device (pytorch issue 188344); use channels_last=false, or a newer torch"
        )
