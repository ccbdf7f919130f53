"""The fused operators: all of operator_cases.py, also with Triton's kernels in its interpreter."""

from tests.models.operator_cases import *  # noqa: F403
from tests.triton_interpreter import needs_triton, run_interpreted


@needs_triton
def test_operators_by_interpreted_kernels() -> None:
    """What GPUs run: whole operators, not only their kernels."""
    run_interpreted("tests/models/operator_cases.py")
