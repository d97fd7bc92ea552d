"""From a source to its cache: opened, used again where it fits, or built anew, with a word why."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..console import say
from ..errors import UsageError
from ..paths import absolute, slug
from .build import FACES_SEED, Wanted, build, check_place, identity
from .cache import (
    FILES,
    ROW,
    SKIPPED,
    Cache,
    DamagedError,
    is_cache,
    open_cache,
    read_cache,
    summary,
)
from .decode import CROP, FILTER
from .images import find_images


def prepare(
    source: str,
    size: int,
    *,
    out: Path | None = None,
    root: Path | None = None,
    flag: str = "--data",
) -> Cache:
    """The cache of `source` at `size` pixels: opened, used again, or built.

    `source` is a folder of images, `faces:N`, or a cache, which is opened as it is. `out` names the
    cache's folder; otherwise it lies in `root` (default: $FASTGAN_CACHE, else fastgan in the user's
    cache folder). Raises `UsageError`, naming `flag`, --out or --cache, for what the user can mend,
    and `RunError` for a damaged cache given as the source or a full disk.
    """
    folder = Path(absolute(source, flag))
    if source.startswith("faces:"):
        wanted = _want_faces(source, size, flag)
    elif is_cache(folder):
        return _open_source(folder, size, out, flag)
    else:
        wanted = _want_folder(folder, size, flag)
    place_flag = "--out" if out is not None else "--cache"
    path = out if out is not None else (root or default_root()) / wanted.folder_name
    path = Path(os.path.realpath(path))  # a link in its place would be in the way of the rename
    reason = check_place(path, place_flag)
    if reason is None:
        return build(wanted, path, flag, place_flag)
    try:
        cache = read_cache(path)
        reason = _difference(cache, wanted)
    except DamagedError as damage:
        reason = f"the cache is damaged: {damage}"
    if reason:
        say(f"rebuilding {path}: {reason}")
        return build(wanted, path, flag, place_flag)
    say(f"{summary(cache)} (reused)")
    return cache


def default_root() -> Path:
    """Where caches lie unless the user says otherwise."""
    try:
        if own := os.environ.get("FASTGAN_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgan"
    except RuntimeError:
        raise UsageError(
            "--cache must name a folder for decoded sets here: there is no home directory for one"
        ) from None


def _open_source(folder: Path, size: int, out: Path | None, flag: str) -> Cache:
    if out is not None:
        raise UsageError(f"--out cannot be used here: {flag} {folder} is a cache already")
    cache = open_cache(folder, flag)
    if cache.meta.size != size:
        raise UsageError(
            f"{flag}: the cache {folder} holds images of {cache.meta.size} px, but --size is {size}"
        )
    say(summary(cache))
    return cache


def _want_faces(source: str, size: int, flag: str) -> Wanted:
    from . import faces

    match = re.fullmatch(r"faces:([0-9]+)", source)
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{flag}: faces:N needs a whole number N, 1 or more; got {source}")
    count = int(match[1])
    digest = _digest("faces", size, [[faces.FACES_VERSION, count, FACES_SEED]])
    return Wanted(f"faces:{count}", size, count, None, digest, digest, f"faces-{count}-{size}px")


def _want_folder(folder: Path, size: int, flag: str) -> Wanted:
    files = find_images(folder, flag)
    source = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    fingerprint = _digest("folder", size, (identity(file) for file in files))
    timeless = _digest("folder", size, ([file.name, file.size_bytes] for file in files))
    name = f"{slug(os.path.basename(source), 'images')}-{size}px-{digest}"
    return Wanted(source, size, len(files), files, fingerprint, timeless, name)


def _digest(kind: str, size: int, items: Iterable[list[Any]]) -> str:
    digest = hashlib.sha256(json.dumps([kind, CROP, FILTER, size]).encode())
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()


def _difference(cache: Cache, wanted: Wanted) -> str:
    """Why the cache does not serve, or an empty string."""
    meta = cache.meta
    if meta.fingerprint == wanted.fingerprint:
        return ""
    if meta.size != wanted.size:
        return f"it holds images of {meta.size} px, not {wanted.size}"
    for what, was, now in (("crop", meta.crop, CROP), ("filter", meta.filter, FILTER)):
        if was != now:
            return f"the {what} is {now} now, was {was}"
    if meta.source != wanted.source:
        return f"it was made from {meta.source}"
    if wanted.files is None:
        return "the drawing code changed"
    before: dict[str, list[Any]] = {}
    for name in (FILES, SKIPPED):
        try:
            for line in (cache.path / name).read_text(encoding="utf-8").splitlines():
                file = json.loads(line)
                before[file["name"]] = [file[key] for key in ROW]
        except (OSError, ValueError, KeyError, TypeError):
            return f"the cache is damaged: {name} cannot be read"
    now_there = {file.name: identity(file) for file in wanted.files}
    added = len(now_there.keys() - before.keys())
    removed = len(before.keys() - now_there.keys())
    changed = sum(before.get(name, row) != row for name, row in now_there.items())
    parts = [(added, "added"), (changed, "changed"), (removed, "removed")]
    said = [f"{count:,} {what}" for count, what in parts if count]
    if not said:
        return "its fingerprint does not fit its files"
    first, *rest = said
    number, what = first.split()
    return ", ".join([f"{number} {'file' if number == '1' else 'files'} {what}", *rest])
