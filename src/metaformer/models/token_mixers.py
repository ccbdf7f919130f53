"""Token mixers: the part of a MetaFormer block that lets positions of an image exchange information."""

from torch import Tensor, nn


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
