"""Where time goes: phases of one start, and what the starts before leave."""

import time

import pytest

from metaformer import goodput
from metaformer.goodput import LOST, SAVING, STARTING, TRAINING, VALIDATING, WAITING, Goodput, TimeSpent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets, as the last number of a list; the process is five seconds old."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    monkeypatch.setattr(goodput, "_age_of_process", lambda: 5.0)
    return times


def test_phases_of_one_start(clock: list[float]) -> None:
    """Imports count as starting; waiting is taken from training; a phase in a phase gives back to the one around it."""
    counter = Goodput()
    clock.append(110)
    counter.enter(TRAINING)
    clock.append(130)
    with counter.phase(VALIDATING):
        clock.append(134)
        with counter.phase(SAVING):
            clock.append(135)
    clock.append(140)
    counter.waited(5)
    spent = counter.spent()
    assert spent.seconds == {STARTING: 15, TRAINING: 20, VALIDATING: 4, SAVING: 1, WAITING: 5}
    assert spent.goodput == pytest.approx(100 * 20 / 45)
    assert "training 44.4 %, waiting for data 11.1 %, validation 8.9 %" in str(spent)
    assert str(spent).endswith("of 45 s in 1 start")


def test_what_no_checkpoint_holds_is_lost(clock: list[float]) -> None:
    """Of a start that was killed: training after its last checkpoint counts as lost, the rest as it was."""
    first = Goodput()
    first.enter(TRAINING)
    clock.append(130)
    first.saved()
    clock.append(142)
    killed = first.spent()
    assert (killed.seconds, killed.unsaved[TRAINING]) == ({STARTING: 5, TRAINING: 42}, 12)

    clock.append(200)  # nothing ran
    second = Goodput()
    second.continue_from(killed)
    second.enter(TRAINING)
    clock.append(212)
    spent = second.spent()
    assert spent.starts == 2
    assert {name: value for name, value in spent.seconds.items() if value} == {STARTING: 10, TRAINING: 42, LOST: 12}
    assert spent.unsaved[TRAINING] == 12
    assert spent.goodput == pytest.approx(100 * 42 / 64)


def test_a_start_that_is_killed_before_it_trains_loses_nothing_again(clock: list[float]) -> None:
    """What was counted as lost once is not lost at the next start."""
    second = Goodput()
    second.continue_from(TimeSpent(1, {TRAINING: 42.0}, {TRAINING: 12.0}))
    third = Goodput()
    third.continue_from(second.spent())
    assert third.spent().seconds[LOST] == 12
    assert third.spent().seconds[TRAINING] == 30


def test_age_of_process() -> None:
    """Seconds since this process was started: some, and less than a day."""
    assert 0 < goodput._age_of_process() < 86400
