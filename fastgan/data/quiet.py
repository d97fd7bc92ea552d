"""Silence for the C libraries that print on file descriptor 2 whatever they think of a bad file."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# File descriptor 2 belongs to the whole process: one thread at a time may turn it away.
_stderr_turn = threading.Lock()
_stderr_spare: TextIO | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Throw away what C libraries print on file descriptor 2, and Python's warnings.

    sys.stderr itself goes on to where it went, so that other threads can still warn.
    """
    global _stderr_spare
    with _stderr_turn, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if _stderr_spare is None:
                # kept open for good, because another thread may still hold it when the block ends
                copy = os.dup(2)
                _stderr_spare = os.fdopen(copy, "w", 1, errors="backslashreplace", closefd=False)
            spare = _stderr_spare
            os.dup2(2, spare.fileno(), inheritable=False)
        except OSError:  # closed from the start: nothing can leak
            yield
            return
        python = sys.stderr
        try:
            if python is not None and _is_fd_2(python):
                python.flush()
                sys.stderr = spare
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
            yield
        finally:
            os.dup2(spare.fileno(), 2)
            if sys.stderr is spare:
                sys.stderr = python


def _is_fd_2(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (OSError, ValueError):  # replaced by something without a descriptor, as in a notebook
        return False
