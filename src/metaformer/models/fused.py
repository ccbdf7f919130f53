"""Fused execution of the paper's blocks: the choice of stages, the computation, and a check on the device."""

from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from metaformer.kernel_check import try_kernels
from metaformer.models.activations import StarReLU
from metaformer.models.channel_mlps import LinearLayer, PointwiseConv, conv_layer
from metaformer.models.kernels import operators
from metaformer.models.metaformer import (
    BlockParts,
    ChannelScale,
    Downsampling,
    MetaFormer,
    MetaFormerBlock,
    Stage,
    run_plain,
    stage_sides,
)
from metaformer.models.norms import ChannelLayerNorm, GroupNormWithoutBias, group_norm
from metaformer.models.token_mixers import Identity, Pooling

TOLERANCE = 0.02  # relative error allowed by the check; TF32 in the plain path's convolutions causes 1e-3


class BlockShape(NamedTuple):
    """The input shape and pooling window, for which Triton specialises its kernels, and the block's other parts.

    Window 0 means that no token mixer is fused.
    """

    channels: int
    side: int
    window: int
    images: int
    parts: BlockParts


def fuse(model: MetaFormer) -> int:
    """Switch all stages whose blocks are fusable to fused operators, and return their number.

    The model, which must run on a GPU, is changed in place; the keys and values of its state dict stay the same. Call
    `find_fault` first.
    """
    stages = fusable_stages(model)
    following = dict(pairwise(model.stages))
    for stage in stages:
        stage.run_blocks = partial(run_fused, rounded=_starts_with_convolution(following.get(stage)))
    return len(stages)


def _starts_with_convolution(stage: nn.Module | None) -> bool:
    """Return whether a stage rounds its input to the type of the matrix products before anything else."""
    downsample = stage.downsample if isinstance(stage, Stage) else None
    return isinstance(downsample, Downsampling) and isinstance(downsample.norm, nn.Identity)


def fusable_stages(model: MetaFormer) -> list[Stage]:
    """Return the stages in which every block is fusable."""
    stages = [stage for stage in model.stages if isinstance(stage, Stage)]
    return [stage for stage in stages if all(is_fusable(block) for block in stage.blocks)]


def whole_stages(model: MetaFormer) -> list[Stage]:
    """Return the fusable stages in which the token mixer of every block is fused, too."""
    return [
        stage
        for stage in fusable_stages(model)
        if all(_mixer_is_fused(cast(MetaFormerBlock, block)) for block in stage.blocks)
    ]


def is_fusable(block: nn.Module) -> bool:
    """Return whether the fused operators compute a block's MLP branch, which is that of both papers' networks.

    Its norm is over the image or over the channels of each position, and its activation is GELU or StarReLU.
    """
    return (
        isinstance(block, MetaFormerBlock)
        and block.residual
        and block.channel_mlp
        and type(block.mlp.fc1) in (PointwiseConv, LinearLayer)
        and (
            type(block.mlp.act) is StarReLU or (type(block.mlp.act) is nn.GELU and block.mlp.act.approximate == "none")
        )
        and (_is_image_norm(block.norm2) or type(block.norm2) is ChannelLayerNorm)
    )


def _mixer_is_fused(block: MetaFormerBlock) -> bool:
    """Return whether the fused operators compute a fusable block's token mixer branch, too."""
    return type(block.token_mixer) in (Pooling, Identity) and _is_image_norm(block.norm1)


def _is_image_norm(norm: nn.Module) -> bool:
    if not isinstance(norm, nn.GroupNorm) or type(norm) not in (nn.GroupNorm, GroupNormWithoutBias):
        return False
    return norm.num_groups == 1 and norm.affine


def run_fused(blocks: nn.Sequential, x: Tensor, rounded: bool = False) -> Tensor:
    """Compute `blocks(x)` with fused operators.

    Args:
        blocks: all of them must be fusable.
        x: images.
        rounded: return the type of the matrix products, for a consumer that would round the result to it anyway.

    Returns:
        Images, channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    types = _Types(x.dtype, x.dtype)
    if torch.is_autocast_enabled(x.device.type):
        # The stream as in plain blocks: LayerScale starts at 1e-5, which bfloat16 (4e-3) would lose.
        types = _Types(torch.get_autocast_dtype(x.device.type), torch.float32, autocasts=True)
    modules = [cast(MetaFormerBlock, block) for block in blocks]
    with torch.autocast(x.device.type, enabled=False):
        weight = cast(Tensor, modules[0].norm2.weight)
        absent = _Absent(weight, weight)  # not used
        if not all(_has_all_parameters(block) for block in modules):
            absent = _Absent(weight.new_zeros(4 * len(weight)), weight.new_ones(len(weight)))
        stats = None
        for block, following in zip(modules, [*modules[1:], modules[0]], strict=True):  # the last statistics are unused
            out = types.product if rounded and block is modules[-1] else types.stream
            x, stats = _run_block(block, cast(float, following.norm1.eps), x, stats, types, out, absent)
    return x


class _Types(NamedTuple):
    """The types of matrix products and of images between branches, and whether plain layers run under autocast."""

    product: torch.dtype
    stream: torch.dtype
    autocasts: bool = False


def _run_block(
    block: MetaFormerBlock,
    following_eps: float,
    x: Tensor,
    stats: Tensor | None,
    types: _Types,
    out: torch.dtype,
    absent: "_Absent",
) -> tuple[Tensor, Tensor]:
    """Return the images after a block, of type `out` if it pools, and their statistics.

    `stats` are those of x, or None.
    """
    parameters, activation = _parameters_of(block, absent)
    scales = [each.scale for each in (block.res_scale1, block.res_scale2) if isinstance(each, ChannelScale)]
    eps = [cast(float, block.norm2.eps), following_eps]
    if _mixer_is_fused(block):
        stats = operators.statistics(x.detach(), cast(float, block.norm1.eps)) if stats is None else stats
        keep = _drop_path_factors(block.drop_path1, x, types.stream, 2)
        if isinstance(block.token_mixer, Pooling):
            window = cast(int, block.token_mixer.pool.kernel_size)
            y, y_stats, *_ = operators.block(
                x, stats, parameters, keep, scales, window, activation, *eps, types.product, types.stream, out
            )
            return y, y_stats
        keep1, keep2 = (None, None) if keep is None else keep
        weight, bias, layer_scale = parameters[: operators.MIXER_PARAMETERS]
        norm = [weight * layer_scale, bias * layer_scale]
        x, stats = operators.identity_branch(x.to(types.stream), stats, norm, keep1, scales[:1], eps[0])
    else:
        with torch.autocast(x.device.type, types.product, enabled=types.autocasts):
            x = block.mix_tokens(x.to(types.stream))
        stats = operators.statistics(x.detach(), eps[0]) if _is_image_norm(block.norm2) else None
        keep = _drop_path_factors(block.drop_path2, x, types.stream, 1)
        keep2 = None if keep is None else keep[0]
    mlp = parameters[operators.MIXER_PARAMETERS :]
    y, y_stats, *_ = operators.mlp_branch(x, stats, mlp, keep2, scales[1:], activation, *eps, types.product)
    return y, y_stats


def _has_all_parameters(block: MetaFormerBlock) -> bool:
    biases = (block.norm1.bias, block.norm2.bias, block.mlp.fc1.bias, block.mlp.fc2.bias)
    scales = (block.layer_scale1, block.layer_scale2)
    return all(bias is not None for bias in biases) and all(isinstance(scale, ChannelScale) for scale in scales)


class _Absent(NamedTuple):
    """Constants in place of parameters that a block does not have: biases [4C] and LayerScale [C]."""

    biases: Tensor
    scale: Tensor

    def bias(self, found: Tensor | None, size: int) -> Tensor:
        return self.biases[:size] if found is None else found

    def layer_scale(self, found: nn.Module) -> Tensor:
        return found.scale if isinstance(found, ChannelScale) else self.scale


def _parameters_of(block: MetaFormerBlock, absent: _Absent) -> tuple[list[Tensor], str]:
    """Return the parameters of `operators.Parameters`, and the activation.

    StarReLU's parameters go into the second layer W: W (s relu(x)^2 + b) = (s W) relu(x)^2 + b (W's sums over rows).
    """
    norm1, norm2 = (cast(nn.GroupNorm | nn.LayerNorm, norm) for norm in (block.norm1, block.norm2))
    mlp, channels = block.mlp, len(norm1.weight)
    fc2, bias2, activation = _matrix(mlp.fc2.weight), absent.bias(mlp.fc2.bias, channels), "gelu"
    if isinstance(mlp.act, StarReLU):
        fc2, bias2, activation = mlp.act.scale * fc2, bias2 + mlp.act.bias * fc2.sum(1), "squared_relu"
    parameters = operators.Parameters(
        norm1.weight,
        absent.bias(norm1.bias, channels),
        absent.layer_scale(block.layer_scale1),
        norm2.weight,
        absent.bias(norm2.bias, channels),
        _matrix(mlp.fc1.weight),
        absent.bias(mlp.fc1.bias, 4 * channels),
        fc2,
        bias2,
        absent.layer_scale(block.layer_scale2),
    )
    return list(parameters), activation


def _matrix(weight: Tensor) -> Tensor:
    """View a 1x1 kernel [out, in, 1, 1] as a matrix [out, in]; a linear layer's weight is one.

    The permutation gives the gradient the strides of a channels_last weight. With other strides, distributed training
    would warn and copy the gradient.
    """
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def _drop_path_factors(drop_path: nn.Module, x: Tensor, dtype: torch.dtype, branches: int) -> Tensor | None:
    """Draw the factors of each image as `DropPath` does, [branches, B]; return None if nothing is dropped."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep_prob = 1 - drop_path.drop_prob
    factors = x.new_empty((branches, len(x)), dtype=dtype)
    for branch in factors:
        branch.bernoulli_(keep_prob)
    return factors.div_(keep_prob)


def find_fault(model: MetaFormer, image_size: int, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Compare values and gradients of fused and plain blocks on the GPU that will train or evaluate the model.

    Args:
        model: the network whose fusable stages are checked, with their own widths, windows and sides.
        image_size: side of the images in pixels.
        device: the GPU to check.
        dtype: autocast type of the matrix products, or None without autocast.

    Returns:
        A short description of the fault, or None.
    """

    def compare() -> str | None:
        for shape in _stage_shapes(model, image_size):
            error = _relative_difference(device, dtype, shape)
            if not error < TOLERANCE * (1 if dtype is None else 4):
                where = f"{shape.side} x {shape.side} x {shape.channels}"
                return f"they differ from the plain path by {error:.2g} at {where} in {dtype or torch.float32}"
        return None

    return try_kernels(compare)


def _stage_shapes(model: MetaFormer, image_size: int) -> list[BlockShape]:
    """Return the distinct shapes of the fusable stages, for 16 images: most training batches are divisible by 16."""
    sides = dict(zip(model.stages, stage_sides(image_size, len(model.stages)), strict=True))
    shapes = []
    for stage in fusable_stages(model):
        block = cast(MetaFormerBlock, stage.blocks[0])
        side, pools = sides[stage], _mixer_is_fused(block) and isinstance(block.token_mixer, Pooling)
        window = cast(Pooling, block.token_mixer).pool.kernel_size if pools else 0
        channels = len(cast(Tensor, block.norm2.weight))
        shapes.append(BlockShape(channels, side, cast(int, window), 16, _parts_of(block)))
    return list(dict.fromkeys(shapes))


def _parts_of(block: MetaFormerBlock) -> BlockParts:
    """Return the parts of a fusable block, with a LayerScale that shows errors of its branches."""
    kind = type(block.norm2)
    return BlockParts(
        norm=kind if kind in (GroupNormWithoutBias, ChannelLayerNorm) else group_norm,
        activation=type(block.mlp.act),
        layer_scale_init=0.5 if isinstance(block.layer_scale2, ChannelScale) else None,
        residual_scale=isinstance(block.res_scale2, ChannelScale),
        mlp_layer=LinearLayer if isinstance(block.mlp.fc1, LinearLayer) else conv_layer,
        mlp_bias=block.mlp.fc1.bias is not None,
    )


def _relative_difference(device: torch.device, dtype: torch.dtype | None, shape: BlockShape) -> float:
    """Return the largest relative difference, by norm, of the output and the gradients of two stages.

    Under autocast, each stage reads and returns the type of the matrix products, as between convolutions. One block has
    no drop path; the other blocks at the start, in the middle and at the end of a stage have it.
    """

    channels, side = shape.channels, shape.side

    def mixer(dim: int, side: int) -> nn.Module:
        return Pooling(dim, side, shape.window) if shape.window else Identity(dim, side)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with device:
            stages = [
                nn.Sequential(*(MetaFormerBlock(channels, side, mixer, rate, shape.parts) for rate in rates))
                for rates in ((0.0, 0.4, 0.4), (0.4,))
            ]
        network = nn.Sequential(*stages)
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
        images = torch.randn(shape.images, channels, side, side, device=device)
        results = []
        for run in (run_plain, partial(run_fused, rounded=True)):
            torch.manual_seed(1)
            leaf = images.to(dtype or images.dtype, copy=True).requires_grad_()
            with torch.enable_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                out = leaf
                for stage in stages:
                    out = run(stage, out).to(leaf.dtype)
                loss = (out * images.flip(0)).sum()
            # Pooling cancels norm1's bias, whose gradient consists of rounding errors in the plain path.
            cancelled = "norm1.bias" if shape.window else "none"
            named = {name: p for name, p in network.named_parameters() if not name.endswith(cancelled)}
            gradients = [grad.float() for grad in torch.autograd.grad(loss, [leaf, *named.values()])]
            scalars = torch.cat([images.new_zeros(1), *(grad for grad in gradients if grad.numel() == 1)])
            results.append([out.detach(), *(grad for grad in gradients if grad.numel() > 1), scalars])
    # The scalars of activations are compared together: one of them alone may happen to be nearly zero.
    errors = [(a - b).norm() / a.norm().clamp_min(1e-30) for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())
