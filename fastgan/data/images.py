"""Find the images of a source: all files of a folder with an image's suffix, in a fixed order."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..console import warn
from ..errors import UsageError

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "pgm", "ppm", "pnm")


@dataclass(frozen=True)
class ImageFile:
    """One file that looks like an image by its name; nothing has been read from it yet."""

    name: str  # relative to the searched folder, with `/`
    path: Path
    size_bytes: int
    mtime_ns: int


def find_images(folder: Path, flag: str = "--data") -> list[ImageFile]:
    """All images in `folder` and below it, ordered by the bytes of their names.

    Hidden files and folders are passed over. Links are followed; a folder that several links (or a
    loop of them) lead to is read once. A link to nothing is listed with size 0, so that whoever
    reads it can say so. Raises `UsageError` naming `flag` where there is no such folder, or no
    image in it.
    """
    if not os.path.isdir(folder):
        what = "it is a file" if os.path.exists(folder) else "no such path"
        raise UsageError(f"{flag} must be a folder of images, a cache or faces:N; {what}: {folder}")
    found: list[ImageFile] = []
    visited: set[tuple[int, int]] = set()
    waiting = [("", folder)]
    while waiting:
        prefix, here = waiting.pop()
        below = []
        try:
            entries = _entries(here, visited)
        except OSError as error:
            if here == folder:
                raise UsageError(f"{flag}: cannot read {folder}: {error.strerror}") from error
            warn(f"passed over the folder {here}: {error.strerror}")  # a disk's lost+found
            continue
        for entry in entries:
            info = _stat(entry)
            if info is not None and stat.S_ISDIR(info.st_mode):
                below.append((f"{prefix}{entry.name}/", here / entry.name))
            elif os.path.splitext(entry.name)[1][1:].lower() not in SUFFIXES:
                continue
            elif info is None:
                found.append(ImageFile(prefix + entry.name, here / entry.name, 0, 0))
            elif stat.S_ISREG(info.st_mode):  # a pipe or a socket would block its reader
                path = here / entry.name
                found.append(ImageFile(prefix + entry.name, path, info.st_size, info.st_mtime_ns))
        waiting.extend(reversed(below))  # the first of them is on top
    if not found:
        raise UsageError(f"{flag}: no images ({', '.join(SUFFIXES)}) in {folder}")
    return sorted(found, key=lambda image: os.fsencode(image.name))


def _entries(folder: Path, visited: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """What is seen in a folder, by name; nothing where it was visited before."""
    info = folder.stat()
    if (info.st_dev, info.st_ino) in visited:
        return []
    visited.add((info.st_dev, info.st_ino))
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(seen, key=lambda entry: os.fsencode(entry.name))


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for a link that leads to nothing or to itself."""
    try:
        return entry.stat()
    except OSError:
        return None
