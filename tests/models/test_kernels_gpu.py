"""Triton's kernels, compiled, on a GPU; and the self-check that decides whether they are used."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from metaformer.models.fused import find_fault
from tests.models.kernel_cases import *  # noqa: F403


def test_self_check_passes() -> None:
    """Values and gradients of whole blocks, in float32, bfloat16 and float16."""
    assert find_fault(torch.device("cuda")) is None
