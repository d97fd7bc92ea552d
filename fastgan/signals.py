"""SIGINT and SIGTERM: exceptions where nothing is to be saved, notes in the training loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt so that `finally` blocks clean up."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM inside the block raises `Terminated`."""

    def raise_terminated(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    with _handlers({signal.SIGTERM: raise_terminated}):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM inside the block go into the list it gives; a second Ctrl-C raises.

    A second SIGTERM does not: launchers send it more than once, and the save is under way.
    """
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    with _handlers({signal.SIGINT: note, signal.SIGTERM: note}):
        yield caught


@contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[..., Any]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; a caller that trains in another has its own
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
