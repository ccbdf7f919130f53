"""Which fused parts a run uses: those that pass their check on every rank.

What is used, or why not, is a short text for people: "on (Triton)", "off (rank 3: ...)".
"""

import torch
from torch import nn

from metaformer.config import CommonConfig
from metaformer.data.device import choice
from metaformer.data.device.transform import ImageTransform, transform_plainly
from metaformer.models import fused
from metaformer.models.metaformer import MetaFormer
from metaformer.models.preprocessing import Preprocessing
from metaformer.models.token_mixers import check_pooling
from metaformer.runtime import Runtime


def fuse_blocks(
    config: CommonConfig, images: Preprocessing, runtime: Runtime, model: nn.Module, dtype: torch.dtype | None
) -> str:
    """Let the network compute its blocks by the fused operators where it can; returns what is used.

    Args:
        model: changed in place.
        dtype: of the matrix products under autocast; None without.

    Raises:
        UserError: the plain path would compute wrong gradients on this device.
    """
    if not isinstance(model, MetaFormer):
        return "off (not a network of this project)"
    if not config.channels_last:
        return "off (channels_last=false)"
    stages, used = fused.fusable_stages(model), "off (no stage has the paper's blocks)"
    count = 0
    if not config.model.fused:
        used = "off (model.fused=false)"
    elif stages:
        fault = runtime.first_fault(fused.find_fault(model, images.image_size, runtime.device, dtype))
        count = 0 if fault else fused.fuse(model)
        way = "Triton" if runtime.device.type == "cuda" else "in plain torch on a CPU"
        part = "" if count == len(model.stages) else f", {count} of {len(model.stages)} stages"
        used = f"off ({fault})" if fault else f"on ({way}{part})"
    if count < len(model.stages):
        check_pooling(runtime.device)
    return used


def choose_transform(config: CommonConfig, images: Preprocessing, runtime: Runtime) -> tuple[ImageTransform, str]:
    """The function that normalises, mixes and erases training images, and what is used."""
    if runtime.device.type != "cuda":
        return transform_plainly, "off (a CPU)"
    if not config.channels_last:
        return transform_plainly, "off (channels_last=false)"
    fault = runtime.first_fault(choice.find_fault(runtime.device, images.image_size))
    return (transform_plainly, f"off ({fault})") if fault else (choice.transform_by_triton, "on (Triton)")
