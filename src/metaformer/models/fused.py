"""The paper's blocks by the fused operators: which blocks can take them, and whether a device computes them rightly."""

from typing import cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from metaformer.models.kernels import operators
from metaformer.models.metaformer import MetaFormerBlock
from metaformer.models.token_mixers import Pooling


def is_fusable(block: nn.Module) -> bool:
    """Whether a block consists of the paper's parts; every ablation but another window keeps the plain path."""
    return (
        isinstance(block, MetaFormerBlock)
        and block.residual
        and block.channel_mlp
        and isinstance(block.token_mixer, Pooling)
        and isinstance(block.mlp.act, nn.GELU)
        and block.mlp.act.approximate == "none"
        and all(isinstance(norm, nn.GroupNorm) and norm.num_groups == 1 for norm in (block.norm1, block.norm2))
    )


def run_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """What `blocks(x)` computes, each of them fusable."""
    x = x.contiguous(memory_format=torch.channels_last)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.float()  # as autocast leaves it after the first block: LayerScale is 1e-5, bfloat16 resolves 4e-3
    modules = [cast(MetaFormerBlock, block) for block in blocks]
    with torch.autocast(x.device.type, enabled=False):
        stats = operators.statistics(x.detach(), cast(nn.GroupNorm, modules[0].norm1).eps)
        for block in modules:
            x, stats = _run_block(block, x, stats, dtype)
    return x


def _run_block(block: MetaFormerBlock, x: Tensor, stats: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    norm1, norm2 = cast(nn.GroupNorm, block.norm1), cast(nn.GroupNorm, block.norm2)
    mixer, mlp = cast(Pooling, block.token_mixer), block.mlp
    # The norm's bias cancels; so it gets the gradient zero, not none, which distributed training refuses.
    scale = norm1.weight * block.layer_scale1.scale + 0 * norm1.bias
    x, stats = operators.pool_branch(x, stats, scale, _keep(block.drop_path1, x), cast(int, mixer.pool.kernel_size), norm2.eps)
    x, stats, *_ = operators.mlp_branch(
        x, stats, [norm2.weight, norm2.bias],
        [mlp.fc1.weight.flatten(1), mlp.fc1.bias, mlp.fc2.weight.flatten(1), mlp.fc2.bias],
        block.layer_scale2.scale, _keep(block.drop_path2, x), norm1.eps, dtype,
    )
    return x, stats


def _keep(path: nn.Module, x: Tensor) -> Tensor | None:
    """Drop path's factor for each image, drawn as `DropPath` draws it."""
    if not isinstance(path, DropPath) or not path.training or path.drop_prob == 0:
        return None
    return x.new_empty((len(x), 1, 1, 1)).bernoulli_(1 - path.drop_prob).div_(1 - path.drop_prob).flatten()
