"""Triton's kernels of the network, without a GPU."""

from tests.triton_interpreter import needs_triton, run_interpreted


@needs_triton
def test_interpreted_kernels_equal_the_reference() -> None:
    """All of kernel_cases.py."""
    run_interpreted("tests/models/kernel_cases.py")
