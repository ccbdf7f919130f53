"""Compiled Triton kernels on a GPU, and the check that decides whether they are used."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from metaformer.models import create_model
from metaformer.models.fused import find_fault
from tests.models.kernel_cases import *  # noqa: F403


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["poolformer_s12", "poolformer_m36"])
def test_self_check_passes(name: str, dtype: torch.dtype | None) -> None:
    """Values and gradients of blocks are correct for all widths and sides of the paper's networks."""
    assert find_fault(create_model(name), 224, torch.device("cuda"), dtype) is None
