"""From a source to its cache: opened, used again where it fits, or built anew, with a word why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import lock
from ..config import DataOptions, flag_of
from ..console import bar, say, warn
from ..env import cores
from ..errors import RunError, UsageError
from ..paths import absolute
from .build import build
from .cache import (
    FILES,
    SKIPPED,
    Cache,
    DamagedError,
    is_cache,
    open_cache,
    read_cache,
    summary,
)
from .image_file import ImageFile, open_regular, printable, sha256
from .place import check_place
from .wanted import DEFAULTS, Wanted, pixel_options, want


def prepare(
    source: str,
    options: DataOptions,
    *,
    out: Path | None = None,
    root: Path | None = None,
    verify: bool = False,
    flag: str = "--data",
) -> Cache:
    """The cache of `source` by `options`: opened, used again, or built.

    Args:
        source: a folder of images, a .zip, `faces:N`, or a cache, which is opened as it is.
        out: the cache's folder; otherwise it lies in `root` (default: $FASTGAN_CACHE, else fastgan
            in the user's cache folder).
        verify: use a cache again only if the files' contents are those it was made from.
        flag: what the user calls `source`.

    Raises:
        UsageError: naming the flag, for what the user can mend.
        RunError: a damaged cache is given as the source, or the disk is full.
    """
    folder = Path(absolute(source, flag))
    if not source.startswith("faces:") and is_cache(folder):
        if verify:
            raise UsageError(f"--verify needs the images, and {flag} {folder} is a cache: --check")
        return _open_source(folder, options, out, flag)
    wanted = want(source, options, flag)
    if options.holdout and not wanted.held_out:
        warn(f"--holdout {options.holdout:g} sets none of {wanted.count:,} images aside")
    place_flag = "--out" if out is not None else "--cache"
    path = out if out is not None else (root or default_root()) / wanted.folder_name
    path = Path(os.path.realpath(path))  # a link in its place would be in the way of the rename
    if not verify:  # else that is done once, under the lock
        cache, _ = _reuse(wanted, path, place_flag, verify=False)
        if cache is not None:
            return cache
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.alone(path.parent / f".{path.name}.lock", lambda: _say_waiting(path)) as locked:
            cache, reason = _reuse(wanted, path, place_flag, verify)  # of who was first
            if cache is not None:
                return cache
            if reason:
                say(f"rebuilding {path}: {reason}")
            return build(wanted, path, flag, place_flag, alone=locked)
    except OSError as error:
        raise UsageError(
            f"{place_flag}: cannot write the cache {path}: {error.strerror or error}"
        ) from error


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


def _reuse(wanted: Wanted, path: Path, place_flag: str, verify: bool) -> tuple[Cache | None, str]:
    """The cache at `path` if it serves, else what is wrong with it ("" where none is there)."""
    if not check_place(path, place_flag):
        return None, ""
    try:
        cache = read_cache(path)
        reason, skipped = _difference(cache, wanted), []
        if not reason:
            skipped = list(_lines(path / SKIPPED))
            reason = _readable_now(skipped, wanted)
        if verify and not reason:
            reason = _changed_contents(cache, wanted)
    except DamagedError as damage:
        reason = f"the cache is damaged: {damage}"
    if reason:
        return None, reason
    _check_skipped(skipped, path, wanted.options, wanted.source)
    without = f", without {len(skipped):,} that were skipped" if skipped else ""
    say(f"{summary(cache)} (reused{without})")
    return cache, ""


def _check_skipped(
    skipped: list[dict[str, Any]], path: Path, options: DataOptions, source: str
) -> None:
    """`UsageError` where files were refused when the cache was built, and one is too many."""
    if skipped and options.on_bad == "stop":
        first = f"{printable(skipped[0]['name'])}: {skipped[0].get('reason')}"
        raise UsageError(
            f"--on-bad stop: {len(skipped):,} files of {source} were skipped when {path} was "
            f"built, as {first} (--on-bad skip takes it as it is)"
        )


def _say_waiting(path: Path) -> None:
    say(f"waiting for another process, which builds {path}")


def _open_source(folder: Path, options: DataOptions, out: Path | None, flag: str) -> Cache:
    if out is not None:
        raise UsageError(f"--out cannot be used here: {flag} {folder} is a cache already")
    cache = open_cache(folder, flag)
    if options.size != cache.meta.size:
        raise UsageError(
            f"{flag}: the cache {folder} holds images of {cache.meta.size} px, but --size is "
            f"{options.size}"
        )
    held = {**cache.meta.options, "decoder": cache.meta.decoder}
    for key, wish in {**pixel_options(options), "decoder": options.decoder}.items():
        if wish not in (held.get(key), getattr(DEFAULTS, key)):
            raise UsageError(
                f"{flag_of(key)} {wish} is not what the cache {folder} was made with "
                f"({held.get(key)}): prepare another"
            )
    try:
        _check_skipped(list(_lines(folder / SKIPPED)), folder, options, str(folder))
    except DamagedError as damage:
        raise RunError(f"{flag}: the cache {folder} is damaged: {damage}") from damage
    framed = [
        f"{flag_of(key)[2:]} {value}"
        for key, value in cache.meta.options.items()
        if key != "size" and value != getattr(DEFAULTS, key, None)
    ]
    say(f"{summary(cache)}{' (' + ', '.join(framed) + ')' if framed else ''}")
    return cache


def _difference(cache: Cache, wanted: Wanted) -> str:
    """Why the cache does not serve, or an empty string."""
    meta, decoder = cache.meta, wanted.options.decoder
    if meta.fingerprint == wanted.fingerprint:
        if not wanted.drawn and decoder not in ("auto", meta.decoder):
            return f"it was decoded by {meta.decoder}, not {decoder}"
        return ""
    wishes = pixel_options(wanted.options)
    if meta.size != wanted.options.size:
        return f"it holds images of {meta.size} px, not {wanted.options.size}"
    if meta.source != wanted.source:
        return f"it was made from {meta.source}"
    for key, now in wishes.items():
        if (was := meta.options.get(key)) != now:
            return f"{flag_of(key)} is {now} now, was {was}"
    if wanted.drawn:
        return "the drawing code changed"
    before = _rows(cache)
    now_there = {file.name: file.row() for file in wanted.files}
    added = len(now_there.keys() - before.keys())
    removed = len(before.keys() - now_there.keys())
    changed = sum(
        name in before and any(before[name].get(key) != value for key, value in row.items())
        for name, row in now_there.items()
    )
    parts = [(added, "added"), (changed, "changed"), (removed, "removed")]
    said = [f"{count:,} {what}" for count, what in parts if count]
    if not said:
        return "its fingerprint does not fit its files"
    first, *rest = said
    number, what = first.split()
    return ", ".join([f"{number} {'file' if number == '1' else 'files'} {what}", *rest])


def _readable_now(skipped: list[dict[str, Any]], wanted: Wanted) -> str:
    """A file that could not be read when the cache was built, and can be now; or ""."""
    lost = {row["name"] for row in skipped if str(row.get("reason")).startswith("unreadable")}
    for file in wanted.files if lost else ():
        if file.name in lost and not isinstance(file.read(), str):
            return f"{file.name!a} can be read now"
    return ""


def _changed_contents(cache: Cache, wanted: Wanted) -> str:
    """Why the files' contents are not those the cache was made from, or an empty string."""
    if wanted.drawn:
        return ""
    before, files = _rows(cache), wanted.files
    with bar("verifying", len(files)) as progress, ThreadPoolExecutor(cores()) as threads:
        for done, (file, digest) in enumerate(zip(files, threads.map(_digest, files), strict=True)):
            if file.name not in before:
                raise DamagedError(f"{file.name!a} is in none of its lists")
            if digest != before[file.name].get("sha256"):
                return f"the contents of {file.name!a} changed"
            progress.update(done + 1)
    return ""


def _digest(file: ImageFile) -> str | None:
    return sha256(file.read())


def _rows(cache: Cache) -> dict[str, dict[str, Any]]:
    """The rows of files.jsonl and skipped.jsonl by the files' names."""
    return {row["name"]: row for name in (FILES, SKIPPED) for row in _lines(cache.path / name)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open_regular(path) as lines:
            for line in lines:
                row = json.loads(line)
                if not isinstance(row.get("name"), str):
                    raise ValueError("a row without a name")
                yield row
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path.name} cannot be read ({error})") from error
