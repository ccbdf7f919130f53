"""The model of step time: its terms by hand, and its limits."""

import pytest

from metaformer.reporting.scaling import BACKWARD, Links, Work, exchange_seconds, predict

LINKS = Links(gpus_per_node=8, within_node=100e9, between_nodes=50e9, latency=0.0)
GRADIENTS = 48e6  # bytes; poolformer_s12 has 11.9 million parameters


def test_one_node_and_two() -> None:
    """Within a node 2 * 7/8 of the bytes at its links' speed; a second node adds 2 * 1/2 at the network's."""
    within = 2 * 7 / 8 * GRADIENTS / 100e9
    assert exchange_seconds(GRADIENTS, LINKS, 8) == pytest.approx(within)
    assert exchange_seconds(GRADIENTS, LINKS, 16) == pytest.approx(within + GRADIENTS / 50e9)


def test_latency_counts_hops() -> None:
    """Two for each other GPU of the node, and two for each doubling of the nodes."""
    slow = Links(gpus_per_node=8, within_node=1e30, between_nodes=1e30, latency=1.0)
    assert exchange_seconds(GRADIENTS, slow, 8) == pytest.approx(14)
    assert exchange_seconds(GRADIENTS, slow, 64) == pytest.approx(14 + 6)


def test_what_is_waited_for() -> None:
    """A short exchange hides behind the backward pass but for its last bucket; a long one outlasts it."""
    exchange = exchange_seconds(GRADIENTS, LINKS, 16)
    hidden = predict(Work(compute=1.0, gradient_bytes=GRADIENTS, bucket_bytes=GRADIENTS / 4), LINKS, 16)
    assert hidden.waited == pytest.approx(exchange / 4)
    assert hidden.total == pytest.approx(1.0 + exchange / 4)
    long = predict(Work(compute=exchange / 2, gradient_bytes=GRADIENTS, bucket_bytes=1.0), LINKS, 16)
    assert long.waited == pytest.approx(exchange - BACKWARD * exchange / 2)


def test_no_overlap_and_one_gpu() -> None:
    """Where exchange and arithmetic share the cores, all of it is waited for; one GPU exchanges nothing."""
    step = predict(Work(compute=1.0, gradient_bytes=GRADIENTS, overlap=0.0), LINKS, 8)
    assert step.waited == pytest.approx(step.exchange)
    assert predict(Work(compute=1.0, gradient_bytes=GRADIENTS), LINKS, 1) == (0.0, 0.0, 1.0)
