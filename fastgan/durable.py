"""Writing files so that neither a kill nor a power cut leaves half of one behind."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

SPARE_BYTES = 1 << 20  # what folders, small files and the run's own log take beside what is counted


@contextmanager
def beside(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, to write to: renamed over it when the block ends
    well, gone when not. What a kill leaves of it the next one for `path` takes over.

    Args:
        shared: other processes may write `path` at the same time: each gets a path of its own.
    """
    own = f"{secrets.token_hex(8)}{path.suffix}" if shared else path.name
    scratch = path.with_name(f".tmp.{own}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` new content in one piece, flushed to the disk."""
    with beside(path) as scratch:
        write_flushed(scratch, content)


def write_flushed(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        flush(file)


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file piece by piece, wait until it is on the disk, and return its bytes and its
    SHA-256.
    """
    digest, count = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
            count += len(piece)
        flush(file)
    return count, digest.hexdigest()


def flush(file: IO[Any]) -> None:
    """Wait until what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can (not every file system does)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_space(folder: Path, count: int) -> None:
    """Whether `count` bytes and some more fit onto the disk of `folder`.

    Raises:
        OSError: ENOSPC, with both numbers.
    """
    try:
        disk = shutil.disk_usage(folder)
    except OSError:  # a file system that does not say
        return
    if disk.total and disk.free < count + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {(count + SPARE_BYTES) / 1e6:,.1f} MB are needed, and "
            f"{disk.free / 1e6:,.1f} MB are free",
        )
