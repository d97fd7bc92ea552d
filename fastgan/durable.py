"""Writing files so that neither a kill nor a power cut leaves half of one behind."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` new content in one piece: written beside, then renamed over it."""
    scratch = path.with_name(f".{path.name}.tmp")
    write_flushed(scratch, content)
    os.replace(scratch, path)


def write_flushed(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        flush(file)


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
