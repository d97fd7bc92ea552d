"""Output paths that a user names, checked before anything costly begins."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError


def check_folder(path: Path, flag: str) -> None:
    """Whether folders can be made under `path`; `UsageError` names the flag and what stands in the
    way.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UsageError(
            f"{flag} must be a folder, or a path where one can be made: {place} is a file"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} must be writable: {place} is not")


def empty_folder(path: Path, flag: str) -> Path:
    """`path` as a folder that holds nothing yet, made if need be."""
    check_folder(path, flag)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise UsageError(f"{flag} must be a new or an empty folder: {path} holds files")
    return path


def picture_file(path: Path, suffixes: tuple[str, ...], flag: str) -> Path:
    """`path` as a picture to write: its suffix one of `suffixes`, its folder there or made."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{flag} must end in {', '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise UsageError(f"{flag} must be a file, got the folder {path}")
    check_folder(path.parent, flag)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
