"""Signals: noted inside the loop, raised outside of it, as they were afterwards."""

import os
import signal
import threading

import pytest

from fastgan.signals import Terminated, noted, terminable


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_the_first_ones_are_noted_and_a_second_ctrl_c_raises():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with noted() as caught:
        send(signal.SIGTERM, signal.SIGTERM)  # launchers send it twice
        assert caught == [signal.SIGTERM, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
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
