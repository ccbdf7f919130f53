"""Fixtures for tests of networks."""

import pytest

from metaformer.models.kernels import operators
from tests.models.reference_kernels import REFERENCE


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused operators run on a CPU, with the reference kernels, for which float64 exists."""
    monkeypatch.setattr(operators, "triton_kernels", lambda: REFERENCE)
