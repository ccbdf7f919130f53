"""Which rank the others wait for."""

import time

import pytest
import torch

from metaformer.training.stragglers import Stopwatch, describe_straggler


def test_names_the_slow_rank_and_its_node() -> None:
    """Rank 2 works for eight of ten seconds, the others for three: it is named, with its node and both shares."""
    line = describe_straggler([3.0, 3.5, 8.0, 2.5], ["a", "a", "b", "b"], elapsed=10.0)
    assert line == (
        "slow rank    rank 2 on b: 80 % of the time was its own work, the others' median is 30 %: they wait for it"
    )


@pytest.mark.parametrize(
    ("seconds", "elapsed"),
    [
        ([3.0, 3.0, 3.0], 10.0),
        ([3.0, 4.4, 3.0], 10.0),  # less than half as much again
        ([0.1, 0.9, 0.1], 10.0),  # nine times, and hardly anything
        ([0.0, 0.0], 10.0),
    ],
)
def test_says_nothing_where_nobody_waits(seconds: list[float], elapsed: float) -> None:
    """Equal ranks, a little more work, or much more of next to nothing: no line."""
    assert describe_straggler(seconds, ["a"] * len(seconds), elapsed) is None


@pytest.mark.parametrize("slow", [0, 1])
def test_two_ranks(slow: int) -> None:
    """Either of two can be the slow one."""
    seconds = [1.0, 1.0]
    seconds[slow] = 5.0
    line = describe_straggler(seconds, ["a", "b"], elapsed=6.0)
    assert line is not None
    assert f"rank {slow} on {'ab'[slow]}:" in line


def test_stopwatch_adds_only_what_lies_between() -> None:
    """Two spells of work with a pause: their sum; read again, nothing."""
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        watch.start()
        time.sleep(0.05)
        watch.stop()
        time.sleep(0.2)
    assert 0.1 <= watch.read() < 0.25
    assert watch.read() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stopwatch_measures_the_gpu() -> None:
    """On a GPU the time is the device's: launching takes the host next to none of it."""
    watch, numbers = Stopwatch(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        watch.start()
        began = time.perf_counter()
        for _ in range(200):
            numbers @ numbers
        launched = time.perf_counter() - began
        watch.stop()
        seconds = watch.read()
    assert seconds > 2 * launched
    assert watch.read() == 0
