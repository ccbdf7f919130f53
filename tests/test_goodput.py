"""Tests of the time accounting, within a start and across starts."""

import time

import pytest

from metaformer import goodput
from metaformer.goodput import LOST, SAVING, STARTING, TRAINING, VALIDATING, WAITING, Goodput, TimeSpent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose last number is the current time; the process is five seconds old."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    monkeypatch.setattr(goodput, "_age_of_process", lambda: 5.0)
    return times


def test_phases_of_one_start(clock: list[float]) -> None:
    """Imports count as starting, waiting is subtracted from training, and nested phases return to the outer one."""
    counter = Goodput()
    clock.append(110)
    counter.enter(TRAINING)
    clock.append(130)
    with counter.phase(VALIDATING):
        clock.append(134)
        with counter.phase(SAVING):
            clock.append(135)
    clock.append(140)
    counter.record_wait(5)
    spent = counter.spent()
    assert spent.seconds == {STARTING: 15, TRAINING: 20, VALIDATING: 4, SAVING: 1, WAITING: 5}
    assert spent.goodput == pytest.approx(100 * 20 / 45)
    assert spent.lines == (
        "45 s in 1 start: training 44.4 %, waiting for data 11.1 %,",
        "validation 8.9 %, saving 2.2 %, starting 33.3 %, lost 0.0 %",
    )


def test_unsaved_training_is_lost(clock: list[float]) -> None:
    """Training of a killed start after its last checkpoint counts as lost; its other time is unchanged."""
    first = Goodput()
    first.enter(TRAINING)
    clock.append(130)
    first.record_save()
    clock.append(142)
    killed = first.spent()
    assert (killed.seconds, killed.unsaved[TRAINING]) == ({STARTING: 5, TRAINING: 42}, 12)

    clock.append(200)  # no process ran
    second = Goodput()
    second.continue_from(killed)
    second.enter(TRAINING)
    clock.append(212)
    spent = second.spent()
    assert spent.starts == 2
    assert {name: value for name, value in spent.seconds.items() if value} == {STARTING: 10, TRAINING: 42, LOST: 12}
    assert spent.unsaved[TRAINING] == 12
    assert spent.goodput == pytest.approx(100 * 42 / 64)


def test_lost_time_is_not_counted_again(clock: list[float]) -> None:
    """Time already counted as lost is not counted again at the next start."""
    second = Goodput()
    second.continue_from(TimeSpent(1, {TRAINING: 42.0}, {TRAINING: 12.0}))
    third = Goodput()
    third.continue_from(second.spent())
    assert third.spent().seconds[LOST] == 12
    assert third.spent().seconds[TRAINING] == 30


def test_age_of_process() -> None:
    """The age of this process is positive and less than a day."""
    assert 0 < goodput._age_of_process() < 86400
