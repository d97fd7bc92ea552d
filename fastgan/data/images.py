"""Find the images of a source: all files of a folder, or members of a zip, with an image's suffix,
in one fixed order.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..console import warn
from ..errors import UsageError
from .archive import list_archive
from .image_file import ImageFile, name_bytes, printable, suffix_of

JPEG_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif")
SUFFIXES = (*JPEG_SUFFIXES, "png", "webp", "bmp", "tif", "tiff", "pgm", "ppm", "pbm", "pnm")


def find_images(source: Path, flag: str = "--data") -> list[ImageFile]:
    """All images of a folder, in depth, or of a zip, ordered by the bytes of their names.

    Hidden files and folders are passed over. Links are followed in a folder, which is read once
    however many links (or a loop of them) lead to it; a link to nothing is listed with its fault.
    Raises `UsageError` naming `flag` where there is no such source, or no image in it.
    """
    if os.path.isdir(source):
        found = _in_folder(source, flag)
    elif source.suffix.lower() == ".zip" and os.path.isfile(source):
        found = list_archive(str(source), SUFFIXES, flag)
    else:
        what = "it is a file" if os.path.exists(source) else "no such path"
        raise UsageError(
            f"{flag} must be a folder of images, a .zip, a cache or faces:N; {what}: {source}"
        )
    if not found:
        raise UsageError(f"{flag}: no images ({', '.join(SUFFIXES)}) in {source}")
    return sorted(found, key=lambda image: name_bytes(image.name))


def _in_folder(folder: Path, flag: str) -> list[ImageFile]:
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
            # such as a disk's lost+found
            warn(f"passed over the folder {printable(str(here))}: {error.strerror}")
            continue
        for entry in entries:
            info = _stat(entry)
            if info is None or stat.S_ISREG(info.st_mode):
                if suffix_of(entry.name) in SUFFIXES:
                    found.append(_listed(prefix + entry.name, entry.path, info))
            elif stat.S_ISDIR(info.st_mode):
                below.append((f"{prefix}{entry.name}/", here / entry.name))
            # the rest are pipes and sockets, which would block their reader
        # the first by name is on top: of two links to one folder always the same gives its name
        waiting += sorted(below, key=lambda item: name_bytes(item[1].name), reverse=True)
    return found


def _listed(name: str, path: str, info: os.stat_result | None) -> ImageFile:
    if info is None:
        return ImageFile(name, path, 0, 0, fault="unreadable: a link that leads to no file")
    return ImageFile(name, path, info.st_size, info.st_mtime_ns)


def _entries(folder: Path, visited: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """What is seen in a folder; nothing where it was visited before."""
    info = folder.stat()
    if (info.st_dev, info.st_ino) in visited:
        return []
    visited.add((info.st_dev, info.st_ino))
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for a link that leads to nothing or to itself."""
    try:
        return entry.stat()
    except OSError:
        return None
