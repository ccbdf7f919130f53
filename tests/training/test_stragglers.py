"""Test which rank is reported as slow."""

import time

import pytest
import torch

from metaformer.training.stragglers import Stopwatch, describe_straggler


def test_names_the_slow_rank_and_its_node() -> None:
    """A rank that works for eight of ten seconds, others for about three, is named with its node and both shares."""
    line = describe_straggler([3.0, 3.5, 8.0, 2.5], ["a", "a", "b", "b"], elapsed=10.0)
    assert line == (
        "slow rank    rank 2 on b: 80 % of the time was its own work, the others' median is 30 %: they wait for it"
    )


@pytest.mark.parametrize(
    ("seconds", "elapsed"),
    [
        ([3.0, 3.0, 3.0], 10.0),
        ([3.0, 4.4, 3.0], 10.0),  # less than 1.5 times the median
        ([0.1, 0.9, 0.1], 10.0),  # nine times the median, but a small share
        ([0.0, 0.0], 10.0),
    ],
)
def test_no_line_if_nobody_waits(seconds: list[float], elapsed: float) -> None:
    """Equal ranks, slightly more work, or much more of very little work give no line."""
    assert describe_straggler(seconds, ["a"] * len(seconds), elapsed) is None


@pytest.mark.parametrize("slow", [0, 1])
def test_two_ranks(slow: int) -> None:
    """Either of two ranks can be the slow one."""
    seconds = [1.0, 1.0]
    seconds[slow] = 5.0
    line = describe_straggler(seconds, ["a", "b"], elapsed=6.0)
    assert line is not None
    assert f"rank {slow} on {'ab'[slow]}:" in line


def test_stopwatch_excludes_pauses() -> None:
    """The stopwatch adds up work without pauses, and reading it resets it."""
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
    """On a GPU, the stopwatch measures device time, not the time that launching takes on the host."""
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
