"""Locks between processes, by `flock` on a file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

fcntl: Any = None  # Windows has no flock: there nothing is locked
with suppress(ImportError):
    fcntl = importlib.import_module("fcntl")


def try_lock(file: IO[Any], shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process has it. A `shared` one goes
    with others of its kind.

    Raises `OSError` where there are no locks, as on some network file systems.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """The block is run by one process at a time, by the lock file `path`, which is gone afterwards.

    `waiting` is called once if another process is first. Where there are no locks the block runs
    all the same, and is given False.
    """
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            waiting()

    while True:
        with open(path, "a") as file:  # its end ends the lock
            locked = _lock(file, tell)
            if locked and not _in_place(file, path):
                continue  # who had the lock before has unlinked its file
            try:
                yield locked
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: IO[Any], waiting: Callable[[], None]) -> bool:
    """Whether the file is locked now; False where there are no locks."""
    try:
        if not try_lock(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return fcntl is not None


def _in_place(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
