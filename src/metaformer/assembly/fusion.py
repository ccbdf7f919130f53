"""Selects the fused operators and transforms that pass their check on every rank.

The selection is reported as a short text, such as "on (Triton)" or "off (rank 3: ...)".
"""

import torch
from torch import nn

from metaformer.config import CommonConfig, TrainConfig
from metaformer.data.device import choice
from metaformer.data.device.randaugment import BatchAugmentation, apply_to_batch
from metaformer.data.device.transform import ImageTransform, transform_plainly
from metaformer.data.load.config import LoaderName
from metaformer.models import fused
from metaformer.models.config import Preprocessing
from metaformer.models.metaformer import MetaFormer
from metaformer.models.token_mixers import check_pooling
from metaformer.runtime import Runtime


def fuse_blocks(
    config: CommonConfig, images: Preprocessing, runtime: Runtime, model: nn.Module, dtype: torch.dtype | None
) -> str:
    """Switch the network's blocks to the fused operators on a GPU if possible, and return a status text.

    If the plain path is needed and would compute wrong gradients on this GPU, this is an error.

    Args:
        model: The network, which is modified in place.
        dtype: The dtype of matrix products under autocast, or None without autocast.
    """
    if runtime.device.type != "cuda":
        return "off (CPU)"
    if not isinstance(model, MetaFormer):
        return "off (not a network of this project)"
    if not config.channels_last:
        return "off (channels_last=false)"
    stages, status = fused.fusable_stages(model), "off (no stage has the papers' MLPs)"
    whole = 0  # stages whose token mixers are fused, too
    if not config.model.fused:
        status = "off (model.fused=false)"
    elif stages:
        fault = runtime.first_fault(fused.find_fault(model, images.image_size, runtime.device, dtype))
        count = 0 if fault else fused.fuse(model)
        whole, total = 0 if fault else len(fused.whole_stages(model)), len(model.stages)
        partial = "" if whole == total else f", MLPs in {count} of {total} stages, token mixers in {whole}"
        status = f"off ({fault})" if fault else f"on (Triton{partial})"
    if whole < len(model.stages):
        check_pooling(runtime.device)
    return status


def choose_transform(config: CommonConfig, images: Preprocessing, runtime: Runtime) -> tuple[ImageTransform, str]:
    """Return the function that normalises, mixes and erases training images, and a status text."""
    if runtime.device.type != "cuda":
        return transform_plainly, "off (CPU)"
    if not config.channels_last:
        return transform_plainly, "off (channels_last=false)"
    fault = runtime.first_fault(choice.find_fault(runtime.device, images.image_size))
    return (transform_plainly, f"off ({fault})") if fault else (choice.transform_by_triton, "on (Triton)")


def choose_randaugment(
    config: TrainConfig, images: Preprocessing, runtime: Runtime, loader: LoaderName
) -> tuple[BatchAugmentation, list[str]]:
    """Return the function that applies RandAugment to DALI's images, and a status text if they are on a GPU."""
    on_gpu = runtime.device.type == "cuda" and loader is LoaderName.dali
    if not on_gpu or not config.augmentation.randaugment.num_ops:
        return apply_to_batch, []
    fault = runtime.first_fault(choice.find_randaugment_fault(runtime.device, images.image_size))
    if fault:
        return apply_to_batch, [f"RandAugment in plain torch ({fault})"]
    return choice.augment_by_triton, ["RandAugment on (Triton)"]
