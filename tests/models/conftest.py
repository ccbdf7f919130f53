"""Fixtures for tests of networks."""

import os
from typing import Any

import numpy as np
import pytest
import torch

from metaformer.models.kernels import operators
from tests.models.reference_kernels import REFERENCE


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused operators run on a CPU, with the reference kernels, for which float64 exists."""
    monkeypatch.setattr(operators, "triton_kernels", lambda: REFERENCE)


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter compute with bfloat16 as GPUs do.

    It stores bfloat16 as uint16, and its tl.dot multiplies these integers. It also truncates, where GPUs round.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def convert_and_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (cast(builder, each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b))
        return dot(builder, a, b, *others)

    def round_to_nearest(builder: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(builder, source, kind)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), kind.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", convert_and_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", round_to_nearest)
