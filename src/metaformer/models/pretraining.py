"""Initialises training on classes of ImageNet-21K with weights that were trained on all of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models.weights import Convert, load_weights


def load_weights_of_21k(
    model: nn.Module, path: Path, wnids: Sequence[str], prepare: Convert = lambda state: state
) -> list[str]:
    """Load weights of a network with the 21,841 classes of ImageNet-21K; the classifier keeps the rows of `wnids`.

    n04399382 of ImageNet-1K, which ImageNet-21K does not have, gets the mean of all rows, as in the authors' program.

    The model is unchanged if the file does not match.

    Args:
        model: a network with len(wnids) classes.
        path: a file for `read_weights`.
        wnids: the network's classes in order.
        prepare: changes the state dict first.

    Returns:
        The wnids that ImageNet-21K does not have.
    """
    row_of = {wnid: row for row, wnid in enumerate(ImageNetInfo("imagenet-22k").label_names())}
    missing = [wnid for wnid in wnids if wnid not in row_of]
    unknown = set(missing) - set(ImageNetInfo().label_names())
    if unknown:
        raise UserError(
            f"init_head=from_21k: ImageNet-21K has no class {min(unknown)} (and {len(unknown) - 1} more of "
            f"{len(wnids)}); the class folders must be named by wnids"
        )
    rows = torch.tensor([row_of.get(wnid, -1) for wnid in wnids])

    def select(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != len(row_of):
            return tensor
        return torch.where((rows < 0).view(-1, *[1] * (tensor.ndim - 1)), tensor.mean(0), tensor[rows])

    load_weights(model, path, convert=lambda state: {key: select(tensor) for key, tensor in prepare(state).items()})
    return missing


def describe_missing(wnids: Sequence[str]) -> str:
    """Describe the classes that ImageNet-21K does not have."""
    return f"ImageNet-21K has no {', '.join(wnids)}; the classifier's rows start at the mean of all"
