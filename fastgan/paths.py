"""Output paths that a user names, checked before anything costly begins."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from .errors import UsageError


def check_folder(path: Path, flag: str) -> None:
    """Whether folders can be made under `path`; `UsageError` names the flag and what stands in the
    way.
    """
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not os.path.isdir(place):
        raise UsageError(
            f"{flag} must be a folder, or a path where one can be made: {place} is "
            f"{'a link to nothing' if place.is_symlink() else 'a file'}"
        )
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"{flag} must be readable and writable: {place} is not")


def make_folder(path: Path, flag: str) -> None:
    """Make `path` a folder, if it is none yet."""
    check_folder(path, flag)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be made: {error.strerror}") from None


def empty_folder(path: Path, flag: str) -> Path:
    """`path` as a folder that holds nothing yet, made if need be."""
    make_folder(path, flag)
    if any(path.iterdir()):
        raise UsageError(f"{flag} must be a new or an empty folder: {path} holds files")
    return path


def picture_file(path: Path, suffixes: tuple[str, ...], flag: str) -> Path:
    """`path` as a picture to write: its suffix one of `suffixes`, its folder there or made."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{flag} must end in {', '.join(suffixes)}, got {path}")
    path = Path(os.path.realpath(path))  # of a link, what it leads to
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{flag}: the name is too long: {path}") from None
        kind = stat.S_IFREG  # not there yet, or its folder will say why
    if not stat.S_ISREG(kind):
        what = "folder" if stat.S_ISDIR(kind) else "device or pipe"
        raise UsageError(f"{flag} must be a file, got the {what} {path}")
    make_folder(path.parent, flag)
    return path


def slug(name: str, otherwise: str) -> str:
    """`name` in small letters, digits and hyphens, 40 at the most; `otherwise` if none are left."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or otherwise


def absolute(source: str, flag: str) -> str:
    """A data source whose path, if it is one, means the same from every folder."""
    if source.startswith("faces:"):
        return source
    try:
        path = os.path.abspath(Path(source).expanduser())
        os.stat(path)
        return path
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{flag}: the path is too long: {source[:99]}...") from None
        return path
    except RuntimeError:
        raise UsageError(
            f"{flag} begins with a home directory that is not known: {source}"
        ) from None
