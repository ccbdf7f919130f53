"""Records the kernel launches of a training step on a GPU, by running the training loop's step on fake tensors.

The fake tensors are on the CPU, because torch cannot run autograd for a GPU that does not exist. The fused operators
run as on a GPU, with the Triton kernels. A torch operator counts as one launch unless its GPU implementation is known
to take more.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu.compiling import KernelFacts, KernelLaunch, compiling, extent
from benchmarks.learner import CLASSES, make_learner
from metaformer.data.device import triton_kernel
from metaformer.data.device.choice import augment_by_triton
from metaformer.data.plan.augmentation import RandAugmentConfig
from metaformer.data.plan.randaugment import DRAWS_PER_OPERATION, draw_operations
from metaformer.interfaces import Batch
from metaformer.models import create_model
from metaformer.models.fused import fuse
from metaformer.models.kernels import operators
from metaformer.runtime import Runtime
from metaformer.training.step import train_step

# Tensors that one launch of torch's multi-tensor kernels handles (ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_PER_LAUNCH, TENSORS_PER_ADAM_LAUNCH = 110, 36


class Setting(NamedTuple):
    """A training step."""

    model: str = "poolformer_s12"
    image_size: int = 224
    batch: int = 1024
    precision: str = "bf16"

    def __str__(self) -> str:
        name = self.model.removeprefix("poolformer_").upper()
        return f"{name} {self.image_size} px batch {self.batch} {self.precision}"


class Launch(NamedTuple):
    """A kernel launch.

    Attributes:
        bytes: bytes read and written; each tensor counts once.
        flops: operations of matrix products and convolutions.
        programs: size of a Triton kernel's grid.
    """

    name: str
    bytes: int
    flops: int = 0
    facts: KernelFacts | None = None
    programs: int = 0


def record_step(setting: Setting, arch: int) -> list[Launch]:
    """Return the launches of one training step, from uint8 images to updated parameters."""
    model = create_model(setting.model, CLASSES).to(memory_format=torch.channels_last).train()
    fuse(model)
    with as_on_a_gpu(arch) as (launches, mode):
        _replace_parameters(model, mode.from_tensor)
        learner = make_learner(model, Runtime(0, 1, 0, 1, torch.device("cpu")), setting.precision)
        targets, transform = torch.empty(setting.batch, CLASSES), _transform(setting)
        for _ in range(2):  # the first step creates the optimizer's state
            launches.clear()
            train_step(learner, iter([Batch(transform(), targets)]))
    return launches


def record_randaugment(setting: Setting, arch: int) -> list[Launch]:
    """Return the launches of RandAugment on a batch with the recipe's draws, without copies to the device."""
    side, config = setting.image_size, RandAugmentConfig()
    uniform = np.random.default_rng(0).random((setting.batch, config.num_ops, DRAWS_PER_OPERATION))
    with as_on_a_gpu(arch) as (launches, _):
        shape, layout = (setting.batch, 3, side, side), torch.channels_last
        pixels = torch.empty(shape, dtype=torch.uint8, memory_format=layout)
        augment_by_triton(pixels, draw_operations(config, uniform))
    return launches


@contextmanager
def as_on_a_gpu(arch: int) -> Iterator[tuple[list[Launch], FakeTensorMode]]:
    """Within the block, record the launches of a GPU without running them; tensors are fake.

    Yields:
        The list to which each operator appends its launches, and the fake tensor mode.
    """
    launches: list[Launch] = []

    def note(launch: KernelLaunch) -> None:
        facts, programs = launch.facts, launch.programs
        launches.append(Launch(facts.name, launch.bytes, facts.flops * programs, facts, programs))

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        compiling(arch, note),
        mock.patch.object(operators, "can_output_float32", return_value=True),
        _Recorder(launches.append),
    ):
        yield launches, mode


def _replace_parameters(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(convert(parameter.detach()))


def _transform(setting: Setting) -> Callable[[], Tensor]:
    """Return a function that mixes and erases a batch of images."""
    batch, side = setting.batch, setting.image_size
    pixels = torch.empty(batch, 3, side, side, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    boxes, keys = torch.empty(batch, 4, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    keep, colours = torch.empty(1), torch.empty(3, 1, 1)
    return lambda: triton_kernel.transform(pixels, colours, colours, (keep, boxes[:1]), (keys, boxes, keys))


class _Recorder(TorchDispatchMode):
    """Passes each operator that launches a kernel to `note` as a Launch; looks into the fused operators."""

    def __init__(self, note: Callable[[Launch], None]) -> None:
        super().__init__()
        self._note = note
        found = [value for value in vars(operators).values() if isinstance(value, CustomOpDef)]
        self._fused: dict[Any, Callable[..., Any]] = {each._opoverload: each._init_fn for each in found}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._fused:
            with self:
                return self._fused[func](*args, **kwargs)
        # Fake tensors have no implementation of it, and its results are not used.
        result = None if func is torch.ops.aten._fused_adamw_.default else func(*args, **kwargs)
        if not _only_allocates_or_views(func, _tensors((args, kwargs)), _tensors(result)):
            for launch in _launches_of(func, args, kwargs, result):
                self._note(launch)
        return result


def _only_allocates_or_views(func: Any, inputs: list[Tensor], results: list[Tensor]) -> bool:
    """Return whether a call launches nothing. An operator such as `to` returns a view of its input, or a copy.

    `lift_fresh` makes a fake tensor of one on the host.
    """
    aliases = [returned.alias_info for returned in func._schema.returns]
    may_be_view = any(alias is not None and not alias.is_write for alias in aliases)
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    is_view = may_be_view and all(tensor.untyped_storage()._cdata in storages for tensor in results)
    name = func._schema.name
    return is_view or not name.startswith("aten::") or "empty" in name or name == "aten::lift_fresh"


def _launches_of(func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[Launch]:
    name = func._schema.name.removeprefix("aten::")
    if func is torch.ops.aten.convolution_backward.default:
        yield from _convolution_backward(args, kwargs, result)
        return
    inputs, outputs = _tensors((args, kwargs)), _tensors(result)
    if func is torch.ops.aten._fused_adamw_.default:
        lists = args[:4]  # parameters, gradients, two moments: all are read, and all but the gradients written
        moved = [sum(map(extent, tensors)) for tensors in lists]
        count = math.ceil(len(args[0]) / TENSORS_PER_ADAM_LAUNCH)
        total = 2 * sum(moved) - moved[1]
    else:
        count = math.ceil(len(inputs) / TENSORS_PER_LAUNCH) if "foreach" in name else 1
        # An operator in place returns its argument; a foreach operator returns nothing, and writes its first list.
        written = outputs or (_tensors(args[0]) if "foreach" in name else [])
        total = sum(map(extent, [*inputs, *written]))
    flops = _flops(func, args, kwargs, result)
    for _ in range(count):
        yield Launch(name, total // count, flops)


def _convolution_backward(args: Any, kwargs: Any, result: Any) -> Iterator[Launch]:
    """Yield a launch for each gradient: of the input, the weight and the bias."""
    grad, image, weight = args[:3]
    flops = _flops(torch.ops.aten.convolution_backward.default, args, kwargs, result)
    read = ((grad, weight), (grad, image), (grad,))
    products = sum(value is not None for value in result[:2])
    for value, inputs, is_product in zip(result, read, (True, True, False), strict=True):
        if value is not None:
            total = sum(map(extent, [*inputs, value]))
            yield Launch("convolution_backward", total, flops // products if is_product else 0)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    counter = flop_registry.get(func._overloadpacket)
    return int(counter(*args, **kwargs, out_val=result)) if counter is not None else 0


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
