"""The configuration of tracking."""

import pytest

from metaformer.errors import UserError
from metaformer.tracking.config import TrackingConfig


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_wait_without_a_bound_is_refused(value: float) -> None:
    """Both bounds are finite and positive; the error names the field."""
    with pytest.raises(UserError, match=f"tracking.open_seconds={value:g}: must be a number of seconds above 0"):
        TrackingConfig(open_seconds=value)
    with pytest.raises(UserError, match=f"tracking.close_seconds={value:g}: must be a number of seconds above 0"):
        TrackingConfig(close_seconds=value)
