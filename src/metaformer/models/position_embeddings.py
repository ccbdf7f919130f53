"""Position embeddings of weights that were trained on images of another size."""

import re
import sys
from collections.abc import Callable

from torch import nn
from torch.nn.functional import interpolate

from metaformer.models.metaformer import MetaFormer
from metaformer.models.weight_formats import StateDict

OWN_KEY = re.compile(r"stages\.\d+\.position_embedding")
TIMM_KEY = re.compile(r"pos_embed|rel_pos|relative_position|attention_bias")


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
    """Return these tensors as timm's own function for the network's pretrained weights makes them."""
    convert: Callable[[StateDict, nn.Module], StateDict] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if convert is None:
        return {}
    try:
        converted = convert(dict(state), model)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # loading reports what does not fit
        return {}
    return {key: converted[key] for key in keys if key in converted}
