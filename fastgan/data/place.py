"""Where a cache lies: what may be replaced, how a finished one gets into its place, and what killed
builds leave behind. Nobody's own files are ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import replace
from pathlib import Path

from ..durable import flush_folder
from ..errors import RunError, UsageError
from .cache import FILES, IMAGES, META, SKIPPED, Cache, DamagedError, is_cache, read_cache
from .image_file import printable


def check_place(path: Path, flag: str) -> bool:
    """Whether a cache is there; `UsageError` for whatever else is in the way.

    A folder is only ever replaced when everything in it was written here: nobody's own files are
    deleted.
    """
    for parent in path.parents:
        if os.path.isdir(parent):
            break
        if os.path.lexists(parent):
            raise UsageError(f"{flag}: cannot make the cache {path}: {parent} is a file")
    if not os.path.lexists(path):
        return False
    if not path.is_dir():
        raise UsageError(f"{flag} must be a folder to write a cache to; {path} is a file")
    if os.path.ismount(path):
        raise UsageError(f"{flag} is a mount point, which cannot be replaced; name a folder in it")
    names = set(os.listdir(path))
    if not names:
        return False
    foreign = sorted(names - {IMAGES, FILES, SKIPPED, META})
    if foreign or not is_cache(path):
        shown = ", ".join(printable(name) for name in (foreign or sorted(names))[:3])
        raise UsageError(
            f"{flag} must be a new folder, an empty one or a cache; "
            f"{path} holds other files ({shown})"
        )
    return True


def meta_text(path: Path) -> bytes | None:
    try:
        return (path / META).read_bytes()
    except OSError:
        return None


def install(building: Path, path: Path, fingerprint: str, replaced: bytes | None) -> Cache:
    """Rename a finished cache into place, where one with the meta.json `replaced` may be.

    Of two that finish at once, the second finds the first one's and drops its own.
    """
    flush_folder(building)
    # opened here: once in place, it may be replaced again
    own = replace(read_cache(building), path=path)
    retired = sibling(path, "old")
    for _ in range(100):
        try:
            os.rename(building, path)  # replaces an empty folder, fails on any other
            flush_folder(path.parent)
            return own
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(DamagedError):
            cache = read_cache(path)
            if cache.meta.fingerprint == fingerprint and meta_text(path) != replaced:
                return cache
        try:
            check_place(path, "the cache")  # what has come there since the build began is not ours
        except FileNotFoundError:
            continue
        except UsageError:
            if not os.path.lexists(path) or is_cache(path):
                continue  # another process was at it
            raise
        with contextlib.suppress(FileNotFoundError):  # another process may have retired it
            os.rename(path, retired)
        remove(retired)
    raise RunError(f"writing the cache {path} failed: other processes keep replacing it")


def sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}"


def sweep(path: Path, alone: bool) -> None:
    """Remove what processes of this host left behind when they were killed.

    One with our own number is a leftover too: in containers the numbers repeat.
    """
    for kind in ("building", "old"):
        own = sibling(path, kind).name
        prefix = own[: own.rindex("-") + 1]
        for name in os.listdir(path.parent):
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdecimal():
                pid = int(number)
                if alone or pid == os.getpid() or not _alive(pid):
                    remove(path.parent / name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove(folder: Path) -> None:
    """Delete the files that a cache consists of and the folder, if nothing else is in it."""
    for name in (META, IMAGES, FILES, SKIPPED):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
