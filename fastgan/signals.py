"""The signals that end a run: exceptions where nothing is to be saved, notes in the training loop.

SIGINT is Ctrl-C, SIGHUP a closed terminal, SIGTERM what schedulers and containers send, SIGUSR1
what Slurm is asked to send some time before it (`--signal=USR1@120`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1")
TERMINATING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# Launchers, process groups and terminals hand on one signal several times over: for so long after
# the first another one is the same. Nobody types twice what schedulers send.
SAME_S = {True: 1.0, False: 5.0}  # Ctrl-C, the others

_raised: list[int] = []  # by `terminable`, which an import or a callback may have swallowed


class Terminated(BaseException):
    """One of `TERMINATING`, raised like KeyboardInterrupt so that `finally` blocks clean up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.name = number, signal.Signals(number).name


def said(number: int) -> str:
    """What ended a command that had nothing to save, in words."""
    if number == signal.SIGINT:
        return "interrupted"
    return f"terminated by {signal.Signals(number).name}"


@contextmanager
def at_once(speaks: bool = True) -> Iterator[None]:
    """Ctrl-C and `TERMINATING` inside the block end the process with a line and 128 + the signal.

    By no exception: in the midst of an import it may be swallowed, or wrapped, or leave a module
    that is half there. Nothing has begun that would have to be put right.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        try:
            if speaks:
                os.write(2, f"fastgan: {said(number)}\n".encode())
        finally:
            os._exit(128 + number)

    with _handlers(dict.fromkeys(_answered([signal.SIGINT, *TERMINATING]), end)):
        yield


@contextmanager
def terminable() -> Iterator[None]:
    """Ctrl-C and `TERMINATING` inside the block raise KeyboardInterrupt and `Terminated`."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        _raised.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    with _handlers(dict.fromkeys([*_answered([signal.SIGINT]), *TERMINATING], terminate)):
        try:
            yield
        finally:
            _raised.clear()


@contextmanager
def deadly() -> Iterator[None]:
    """Ctrl-C and `TERMINATING` inside the block end the process as if nobody had a handler: what
    waits in C++ comes to none.
    """
    with _handlers(dict.fromkeys(_answered([signal.SIGINT, *TERMINATING]), signal.SIG_DFL)):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """Ctrl-C and `TERMINATING` inside the block go into its list, where the first one is the one to
    end by; a second one, SAME_S or more after it, raises.

    One that was raised before, and has ended nothing, is in the list from the start.
    """
    caught: list[int] = list(_raised)
    first = time.monotonic()

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        typed = number == signal.SIGINT
        if caught and time.monotonic() - first >= SAME_S[typed]:
            raise KeyboardInterrupt if typed else Terminated(number)
        if not caught:
            first = time.monotonic()
        caught.append(number)

    with _handlers(dict.fromkeys([signal.SIGINT, *TERMINATING], note)):
        yield caught


def raised() -> int | None:
    """The signal that `terminable` raised in its block, which whatever is raised now may be of."""
    return _raised[0] if _raised else None


def _answered(numbers: list[signal.Signals]) -> list[signal.Signals]:
    """Those that are not ignored, as a shell's background jobs ignore Ctrl-C."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def _handlers(
    handlers: dict[signal.Signals, Callable[..., Any] | signal.Handlers],
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; a caller that trains in another has its own
        return
    hangup = getattr(signal, "SIGHUP", None)
    if hangup in handlers and signal.getsignal(hangup) == signal.SIG_IGN:
        del handlers[hangup]  # under nohup
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
