"""Fused operators: all tests of operator_cases.py, and the same with Triton kernels in its interpreter."""

import pytest

from tests.models.operator_cases import *  # noqa: F403
from tests.triton_interpreter import needs_triton, run_interpreted


@needs_triton
@pytest.mark.whole
@pytest.mark.parametrize("selected", ["blocks", "not blocks"])  # parts that may run in parallel
def test_operators_with_interpreted_kernels(selected: str) -> None:
    """All tests of operator_cases.py pass with the GPUs' kernels in Triton's interpreter."""
    run_interpreted("tests/models/operator_cases.py", "-k", selected)
