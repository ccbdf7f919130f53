"""Asked to stop: a flag, and all ranks stop after the same step."""

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import torch

from metaformer.runtime import Runtime
from metaformer.signals import STOP_SIGNALS
from metaformer.training import interruption
from metaformer.training.interruption import Interruption, StopWaitingError
from tests.ranks import on_ranks

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_the_flag(number: signal.Signals) -> None:
    """Each is only remembered, under its name, and from then on every boundary is one to stop at."""
    asked = Interruption(ALONE)
    with asked.listening():
        assert not asked.requested
        assert not asked.agreed()
        os.kill(os.getpid(), number)
        assert asked.requested
        assert asked.agreed()
        assert asked.agreed()
    assert asked.reason == number.name


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As nohup starts a program: the terminal's end is not the run's."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asked = Interruption(ALONE)
        with asked.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def wait_for_data(asked: Interruption, signals: int) -> None:
    """For long, while so many signals come."""
    with asked.waiting():
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)


def test_a_wait_is_left_at_once() -> None:
    """By a signal that comes during it, and by one that came before; not after it."""
    asked = Interruption(ALONE)
    with asked.listening():
        with asked.waiting():
            pass
        for signals in (1, 0):
            began = time.monotonic()
            with pytest.raises(StopWaitingError):
                wait_for_data(asked, signals)
            assert time.monotonic() - began < 10
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.pending
        assert asked.agreed()
        assert not asked.pending


def test_the_first_signal_is_the_reason() -> None:
    """More of them, as when a launcher passes on what has come already, neither end the process nor change it."""
    asked = Interruption(ALONE)
    with asked.listening():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert asked.reason == "SIGUSR1"


def test_handlers_are_put_back() -> None:
    """Also after an error: a later signal ends the process as it did before."""
    former = [signal.getsignal(number) for number in STOP_SIGNALS]
    asked = Interruption(ALONE)

    def fail() -> None:
        with asked.listening():
            assert all(signal.getsignal(number) not in former for number in STOP_SIGNALS)
            raise RuntimeError("an error")

    with pytest.raises(RuntimeError, match="an error"):
        fail()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == former


def interrupt_twice(pause: float) -> None:
    """In a process of its own: two SIGINT, the second after a pause."""
    interruption.SECONDS_OF_ONE_KEYSTROKE = 0.3
    with Interruption(ALONE).listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("pause", "code"), [(0.0, 0), (0.4, 130)])
def test_a_second_ctrl_c_ends_it(pause: float, code: int) -> None:
    """Not the second of one keystroke, which reaches a process from the terminal and from the launcher."""
    process = multiprocessing.get_context("fork").Process(target=interrupt_twice, args=(pause,))
    process.start()
    process.join(20)
    assert process.exitcode == code


def stop_after_a_signal(runtime: Runtime) -> Any:
    """Ten steps; the last rank gets a signal in the fourth. Ranks exchange other things between, as training does."""
    asked = Interruption(runtime)
    with asked.listening():
        for step in range(1, 11):
            if step == 4 and runtime.rank == runtime.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            assert runtime.sum(torch.ones(1)) == runtime.world_size
            if step % 2:
                assert len(runtime.gather(torch.ones(2))) == runtime.world_size
            if asked.agreed():
                return step, asked.requested, asked.reason
    return None


def test_ranks_stop_after_the_same_step() -> None:
    """A signal on one of two ranks in step 4, known to it at that step's end: both stop at the end of step 5."""
    assert on_ranks(stop_after_a_signal) == [(5, False, "a signal to another rank"), (5, True, "SIGUSR1")]


def settle(runtime: Runtime) -> Any:
    """A signal after the last boundary but one of a run: it ends as any other, and nothing is left under way."""
    asked = Interruption(runtime)
    with asked.listening():
        before = asked.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        asked.finish_vote()
        asked.finish_vote()
        return before, asked.agreed(), float(runtime.sum(torch.ones(1)))


def test_the_last_exchange_is_settled() -> None:
    """After `settle` the ranks' next exchange is a new one."""
    assert on_ranks(settle) == [(False, False, 2.0)] * 2
