"""Undoes steps with non-finite gradients on the device, without making the host wait."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """BatchNorm's running statistics, which a batch with a NaN corrupts before its step is skipped."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._before: list[Tensor] = []

    def keep(self) -> None:
        """Remember the statistics. Call it before a step."""
        self._before = [buffer.clone() for buffer in self._statistics]

    def restore_where(self, skipped: Tensor) -> None:
        """Restore the statistics if `skipped`, a scalar on the device, is not zero."""
        _restore_where(skipped, self._statistics, self._before)


class UndoableStep:
    """Steps of an optimizer that cannot skip steps on the device, unlike torch's fused optimizers.

    The step is always taken; parameters and state are restored on the device if the gradients were not finite. Values
    that the optimizer keeps on the host are restored one step later, when the answer has arrived. This costs a copy of
    parameters and state for the duration of a step. A step that creates state waits for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._last: tuple[_Answer, list[tuple[dict[str, Any], dict[str, Any]]]] | None = None

    @torch.no_grad()
    def take(self, skipped: Tensor) -> None:
        """Take a step, without effect if `skipped`, a scalar on the device, is not zero."""
        self.finish()
        optimizer = self._optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(parameter not in optimizer.state for parameter in parameters):
            if not skipped.item():
                optimizer.step()
            return
        mappings: list[dict[str, Any]] = [*optimizer.param_groups, *optimizer.state.values()]
        tensors = parameters + [value for each in mappings for value in each.values() if _is_on(skipped.device, value)]
        before = [tensor.clone() for tensor in tensors]
        counted = [_on_host(mapping, skipped.device) for mapping in mappings]
        optimizer.step()
        _restore_where(skipped, tensors, before)
        changed = [
            (mapping, {name: value for name, value in former.items() if not _equal(mapping[name], value)})
            for mapping, former in zip(mappings, counted, strict=True)
        ]
        self._last = (_Answer(skipped), changed)

    def finish(self) -> None:
        """Restore the host's values if the last step was skipped. Call it before the optimizer's state is read."""
        if self._last is not None:
            answer, changed = self._last
            self._last = None
            if answer.read():
                for mapping, former in changed:
                    mapping.update(former)


class _Answer:
    """A scalar on its way from the device to the host."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        self._value = value
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._value.numpy())


def _restore_where(skipped: Tensor, tensors: list[Tensor], before: list[Tensor]) -> None:
    undo = skipped > 0
    for tensor, former in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(undo, former, tensor))


def _is_on(device: torch.device, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _on_host(mapping: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a copy of the values that a step may change but that are not on the device, such as a step count."""
    return {
        name: copy.deepcopy(value) for name, value in mapping.items() if name != "params" and not _is_on(device, value)
    }


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
