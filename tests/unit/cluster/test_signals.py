"""Stop signals: the first one stops, and none of them breaks a stop off."""

import contextlib
import signal

import pytest

from cluster.signals import (
    StopRequestedError,
    begin_stop,
    check_stop_requested,
    stop_on_signals,
)

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_the_first_signal_stops_and_further_ones_are_only_told(signum):
    repeats = []
    with stop_on_signals(lambda: repeats.append(signum)):
        with pytest.raises(StopRequestedError) as stopped:
            signal.raise_signal(signum)
        assert stopped.value.signum == signum
        assert repeats == []
        for repeat in STOP_SIGNALS:
            signal.raise_signal(repeat)
    assert len(repeats) == len(STOP_SIGNALS)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_no_signal_interrupts_a_stop_that_began_by_itself(signum):
    repeats = []
    with stop_on_signals(lambda: repeats.append(signum)):
        begin_stop()
        signal.raise_signal(signum)
    assert repeats == [signum]


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with stop_on_signals(lambda: None):
        assert [signal.getsignal(signum) for signum in STOP_SIGNALS] != before
    begin_stop()
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_stop_that_was_swallowed_is_found(signum):
    with stop_on_signals(lambda: None):
        check_stop_requested()
        with contextlib.suppress(StopRequestedError):
            signal.raise_signal(signum)
        with pytest.raises(StopRequestedError) as stopped:
            check_stop_requested()
        assert stopped.value.signum == signum
    check_stop_requested()


def test_a_stop_without_a_signal_was_not_requested():
    with stop_on_signals(lambda: None):
        begin_stop()
        check_stop_requested()
