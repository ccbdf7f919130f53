"""What a run records of itself when it opens its folder."""

import pytest

from metaformer.assembly.run import Run
from metaformer.config import compose_training
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
def test_what_the_number_of_ranks_changes(overrides: list[str], groups: list[int | None]) -> None:
    """On one rank and on two: a rank's batch shares one mixing unless the group is given or nothing is mixed."""
    config = compose_training(overrides)
    expected = [{"ranks": ranks, "images that share one mixing": group} for ranks, group in enumerate(groups, 1)]
    runs = [Run(config, ranks, 4, tiny_state(), "", Goodput()) for ranks in (1, 2)]
    assert [run.derived for run in runs] == expected
