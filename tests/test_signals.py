"""Signals: noted inside the loop, raised outside of it, as they were afterwards."""

import os
import signal
import threading
from contextlib import suppress

import pytest

from fastgan.signals import TERMINATING, Terminated, noted, terminable


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


ALL = [signal.SIGINT, *TERMINATING]


@pytest.mark.parametrize("number", ALL)
def test_the_first_one_is_noted_and_a_second_one_ends_at_once(number, monkeypatch):
    now = 100.0
    monkeypatch.setattr("fastgan.signals.time.monotonic", lambda: now)
    before = {n: signal.getsignal(n) for n in ALL}
    with noted() as caught:
        now += 60  # into the run
        send(number)
        now += 0.9
        send(number)  # launchers send it twice
        assert set(caught) == {number}
        now += 5
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated):
            send(number)
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_signal_that_an_import_swallowed_is_noted_when_training_begins():
    with terminable():
        with suppress(Terminated):
            send(signal.SIGUSR1)
        with noted() as caught:
            assert caught == [signal.SIGUSR1]
    with terminable(), noted() as caught:
        assert caught == []  # of another command


@pytest.mark.parametrize("number", TERMINATING)
def test_outside_the_loop_they_raise_with_their_name(number):
    before = signal.signal(number, signal.SIG_DFL)
    with pytest.raises(Terminated) as caught, terminable():
        send(number)
    assert (caught.value.number, caught.value.name) == (number, signal.Signals(number).name)
    signal.signal(number, before)


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with noted() as caught, terminable():
        send(signal.SIGHUP)
    assert caught == []
    signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_touched():
    seen = []

    def work():
        with noted() as caught, terminable():
            seen.append(caught)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]]
