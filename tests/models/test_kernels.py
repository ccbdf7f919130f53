"""The network's Triton kernels, tested without a GPU."""

from tests.triton_interpreter import needs_triton, run_interpreted


@needs_triton
def test_interpreted_kernels_equal_the_reference() -> None:
    """All tests of kernel_cases.py pass in Triton's interpreter."""
    run_interpreted("tests/models/kernel_cases.py")
