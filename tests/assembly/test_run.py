"""Test the settings that a run records when it opens its folder."""

import pytest

from metaformer.assembly.run import Run
from metaformer.composing import compose_training
from metaformer.goodput import Goodput
from tests.training.conftest import tiny_state


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        ([], [1024, 512]),
        (["accumulation_steps=4"], [256, 128]),
        (["augmentation.mix_group_size=128"], [128, 128]),
        (["augmentation=light"], [None, None]),
    ],
)
def test_settings_that_depend_on_the_ranks(overrides: list[str], groups: list[int | None]) -> None:
    """The images that share a mixing are a rank's batch unless the group size is set or nothing is mixed."""
    config = compose_training(overrides)
    expected = [{"ranks": ranks, "images that share one mixing": group} for ranks, group in enumerate(groups, 1)]
    runs = [Run(config, ranks, 4, tiny_state(), "", Goodput()) for ranks in (1, 2)]
    assert [run.derived_settings for run in runs] == expected
