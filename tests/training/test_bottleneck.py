"""Test the line per epoch that says whether training waits for data."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from metaformer.interfaces import Batch, Waiting
from metaformer.tracking.tracker import NullTracker
from metaformer.training.bottleneck import Bottleneck
from tests.training.conftest import tiny_state
from tests.training.test_loop import Numbers, trainer

ADVICE = {"read": "copy them", "decode": "use pixels", "augment": "use less", "copy": "raise prefetch"}


def test_verdict_by_the_share_of_waiting() -> None:
    """An epoch that waits for a tenth of its time or more is input-bound and gets advice; each counts separately."""
    bottleneck = Bottleneck(ADVICE)
    bottleneck.add(Waiting(read=0.3, decode=0.2), 10)
    bottleneck.add(Waiting(read=0.1, decode=1.3, copy=0.1), 10)
    assert bottleneck.verdict(1) == (
        "epoch 1 input-bound: 10 % of its time went to waiting for data (decoding 75 %, reading files 20 %, "
        "copying batches 5 %, augmentation 0 %); for decoding, use pixels"
    )
    bottleneck.add(Waiting(copy=0.4), 10)
    assert bottleneck.verdict(2) == ("epoch 2 compute-bound: 4 % of its time went to waiting for data")


@dataclass
class Messages(NullTracker):
    """Records messages."""

    lines: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.lines.append(text)


@dataclass
class Slow(Numbers):
    """Data that is delayed by `seconds` per batch, and by another `at_start` for an epoch's first batch."""

    seconds: float = 0.0
    at_start: float = 0.0

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().epoch(epoch, first)):
            delay = self.seconds + (0.0 if number else self.at_start)
            time.sleep(delay)
            yield Batch(batch.images, batch.targets, Waiting(augment=delay))


@pytest.mark.parametrize(
    ("seconds", "at_start", "verdict"),
    [(0.1, 0.0, "input-bound"), (0.0, 0.0, "compute-bound"), (0.0, 0.5, "compute-bound")],
)
def test_each_epoch_gets_a_line(tmp_path: Path, seconds: float, at_start: float, verdict: str) -> None:
    """The loop reports once per epoch and ignores the wait for the first batch, in which workers start."""
    loop = trainer(tiny_state(), tmp_path, Slow(8, seconds=seconds, at_start=at_start))
    tracker = loop.tracker = Messages()
    loop.run()
    assert [line.split(":")[0] for line in tracker.lines] == [f"epoch {epoch} {verdict}" for epoch in (1, 2, 3)]
