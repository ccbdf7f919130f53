"""Position embeddings of weights that were trained on images of another size."""

import math
import re
import sys
from collections.abc import Callable

from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from torch import Size, Tensor, nn
from torch.nn.functional import interpolate

from metaformer.models.metaformer import MetaFormer
from metaformer.models.weight_formats import StateDict

OWN_KEY = re.compile(r"stages\.\d+\.position_embedding")
TIMM_KEY = re.compile(r"pos_embed|patch_pos|rel_pos|relative_position|attention_bias")


class PositionResampling:
    """Resamples the position embeddings of a state dict to the image size of a network, as timm does.

    Attributes:
        note: what the last call has resampled; "" for nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.note = model, ""

    def __call__(self, state: StateDict) -> StateDict:
        """Return the state dict with embeddings of the network's shapes; what cannot be resampled stays as it is."""
        own = self._model.state_dict()
        is_own = isinstance(self._model, MetaFormer)
        pattern = OWN_KEY if is_own else TIMM_KEY
        other = [key for key in own if pattern.search(key) and key in state and state[key].shape != own[key].shape]
        if not other:
            return state
        found = _resample_own(state, own, other) if is_own else _resample_with_timm(state, self._model, other)
        fitting = {key: tensor for key, tensor in found.items() if tensor.shape == own[key].shape}
        if fitting:
            first = next(iter(fitting))
            before, now, more = list(state[first].shape), list(own[first].shape), len(fitting) - 1
            self.note = f"{first} {before} -> {now}{f' and {more} more' if more else ''}, resampled"
        return state | fitting


def _resample_own(state: StateDict, own: StateDict, keys: list[str]) -> StateDict:
    return {
        key: interpolate(state[key].float(), own[key].shape[-2:], mode="bicubic", antialias=True)
        for key in keys
        if state[key].ndim == 4
    }


def _resample_with_timm(state: StateDict, model: nn.Module, keys: list[str]) -> StateDict:
    """Return these tensors as timm's function for the network's pretrained weights makes them.

    For some networks it leaves the tensors as they are: there, timm's functions for grids of embeddings are used.
    """
    convert: Callable[[StateDict, nn.Module], StateDict] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    own, found = model.state_dict(), state
    if convert is not None:
        try:
            found = convert(dict(state), model)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # loading reports what does not fit
            return {}
    return {
        key: found[key] if found[key].shape == own[key].shape else _resample_grid(found[key], own[key].shape)
        for key in keys
        if key in found
    }


def _resample_grid(embedding: Tensor, shape: Size) -> Tensor:
    """Return an embedding of a square grid of positions for another grid; any other tensor stays as it is.

    Args:
        embedding: tokens [1, N, C] in rows of positions after up to two class tokens, or [1, H, H, C] or [1, C, H, H].
        shape: the shape of the embedding to return.
    """
    before, resampled = embedding.shape, embedding
    if len(before) == len(shape) == 3 and before[2] == shape[2]:
        for classes in range(3):
            old, new = math.isqrt(before[1] - classes), math.isqrt(shape[1] - classes)
            if (old**2 + classes, new**2 + classes) == (before[1], shape[1]):
                resampled = resample_abs_pos_embed(embedding, [new, new], num_prefix_tokens=classes)
                break
    elif len(before) == len(shape) == 4 and before[1] == before[2] and before[3] == shape[3]:
        resampled = resample_abs_pos_embed_nhwc(embedding, list(shape[1:3]))
    elif len(before) == len(shape) == 4 and before[2] == before[3] and before[1] == shape[1]:
        resampled = resample_abs_pos_embed_nhwc(embedding.permute(0, 2, 3, 1), list(shape[2:])).permute(0, 3, 1, 2)
    return resampled
