"""SIGINT, SIGTERM, SIGHUP: exceptions where nothing is to be saved, notes in the training loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised like KeyboardInterrupt so that `finally` blocks clean up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.name = number, signal.Signals(number).name


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP inside the block raise `Terminated`."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    with _handlers(dict.fromkeys(TERMINATING, terminate)):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP inside the block go into its list; a second Ctrl-C raises.

    A second SIGTERM does not: launchers send it more than once, and the save is under way.
    """
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    with _handlers(dict.fromkeys([signal.SIGINT, *TERMINATING], note)):
        yield caught


@contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[..., Any]]) -> Iterator[None]:
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
