"""Tests of the tracking configuration."""

import pytest

from metaformer.errors import UserError
from metaformer.tracking.config import TrackingConfig


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_unbounded_waits_are_rejected(value: float) -> None:
    """Both limits must be finite and positive; the error names the field."""
    with pytest.raises(UserError, match=f"tracking.open_seconds={value:g}: must be a number of seconds above 0"):
        TrackingConfig(open_seconds=value)
    with pytest.raises(UserError, match=f"tracking.close_seconds={value:g}: must be a number of seconds above 0"):
        TrackingConfig(close_seconds=value)
