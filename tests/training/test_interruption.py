"""Test that a stop signal sets a flag and that all ranks stop after the same step."""

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
    """Each signal is recorded by name, and every later step boundary is one to stop at."""
    request = Interruption(ALONE)
    with request.listening():
        assert not request.requested
        assert not request.agreed()
        os.kill(os.getpid(), number)
        assert request.requested
        assert request.agreed()
        assert request.agreed()
    assert request.reason == number.name


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """An ignored SIGHUP, as under nohup, does not stop the run."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = Interruption(ALONE)
        with request.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def wait_for_data(request: Interruption, signals: int) -> None:
    """Wait for 20 s after sending this many signals."""
    with request.waiting():
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)


def test_a_wait_ends_at_once() -> None:
    """A signal during or before a wait ends it; a signal after it does not raise."""
    request = Interruption(ALONE)
    with request.listening():
        with request.waiting():
            pass
        for signals in (1, 0):
            began = time.monotonic()
            with pytest.raises(StopWaitingError):
                wait_for_data(request, signals)
            assert time.monotonic() - began < 10
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.pending
        assert request.agreed()
        assert not request.pending


def test_the_first_signal_is_the_reason() -> None:
    """Further signals, as forwarded by a launcher, neither end the process nor change the reason."""
    request = Interruption(ALONE)
    with request.listening():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert request.reason == "SIGUSR1"


def test_handlers_are_restored() -> None:
    """The previous signal handlers are restored, even after an error."""
    former = [signal.getsignal(number) for number in STOP_SIGNALS]
    request = Interruption(ALONE)

    def fail() -> None:
        with request.listening():
            assert all(signal.getsignal(number) not in former for number in STOP_SIGNALS)
            raise RuntimeError("an error")

    with pytest.raises(RuntimeError, match="an error"):
        fail()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == former


def interrupt_twice(pause: float) -> None:
    """Send SIGINT to this process twice, with a pause between."""
    interruption.SECONDS_OF_ONE_KEYSTROKE = 0.3
    with Interruption(ALONE).listening():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("pause", "code"), [(0.0, 0), (0.4, 130)])
def test_a_second_ctrl_c_ends_the_process(pause: float, code: int) -> None:
    """A second keystroke ends the process, but not the duplicate of one, which comes from terminal and launcher."""
    process = multiprocessing.get_context("fork").Process(target=interrupt_twice, args=(pause,))
    process.start()
    process.join(20)
    assert process.exitcode == code


def stop_after_a_signal(runtime: Runtime) -> Any:
    """Run ten steps with other collectives between, as in training; the last rank gets a signal in the fourth."""
    request = Interruption(runtime)
    with request.listening():
        for step in range(1, 11):
            if step == 4 and runtime.rank == runtime.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            assert runtime.sum(torch.ones(1)) == runtime.world_size
            if step % 2:
                assert len(runtime.gather(torch.ones(2))) == runtime.world_size
            if request.agreed():
                return step, request.requested, request.reason
    return None


def test_ranks_stop_after_the_same_step() -> None:
    """A signal on one of two ranks in step 4 stops both at the end of step 5."""
    assert on_ranks(stop_after_a_signal) == [(5, False, "a signal to another rank"), (5, True, "SIGUSR1")]


def finish_vote(runtime: Runtime) -> Any:
    """Finish the vote after a signal between the last two boundaries, then use another collective."""
    request = Interruption(runtime)
    with request.listening():
        before = request.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        request.finish_vote()
        request.finish_vote()
        return before, request.agreed(), float(runtime.sum(torch.ones(1)))


def test_the_last_vote_is_finished() -> None:
    """No vote is pending after `finish_vote`, so the next collective is not affected."""
    assert on_ranks(finish_vote) == [(False, False, 2.0)] * 2
