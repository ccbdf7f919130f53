"""Test the settings of the guards and the error for divergence."""

import pytest

from metaformer.errors import Diverged, UserError
from metaformer.training.config import GuardConfig


@pytest.mark.parametrize(
    "field", ["max_skipped_steps", "stall_seconds", "compare_ranks_every_steps", "max_starts_without_progress"]
)
def test_config_is_checked(field: str) -> None:
    """0 is refused with the field's name, and 1 is accepted."""
    with pytest.raises(UserError, match=rf"^guards\.{field}=0: must be at least 1$"):
        GuardConfig(**{field: 0})
    assert getattr(GuardConfig(**{field: 1}), field) == 1


def test_comparing_ranks_can_be_disabled() -> None:
    """compare_ranks_every_steps may be None."""
    assert GuardConfig(compare_ranks_every_steps=None).compare_ranks_every_steps is None


def test_divergence_has_an_exit_code_of_its_own() -> None:
    """Batch scripts can distinguish divergence from wrong input, and ranks share it like any `UserError`."""
    assert Diverged.exit_code == 3
    assert issubclass(Diverged, UserError)
    assert UserError.exit_code == 2
