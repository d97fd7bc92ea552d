"""What the cache of a source is to hold: which files or faces, in which order, by which options."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import DataOptions, flag_of
from ..errors import UsageError
from ..paths import absolute, slug
from .image_file import ImageFile
from .images import find_images
from .subset import hold_out, take

DEFAULTS = DataOptions()
# of DataOptions: `on_bad` says when to stop, and decoders agree
PIXEL_OPTIONS = set(DataOptions.model_fields) - {"on_bad", "decoder"}
FACES_SEED = 0
MOST_CHOSEN = 10_000_000  # drawn faces of which each has a hash: a gigabyte of names


@dataclass(frozen=True)
class Wanted:
    """What a cache is to hold: the first rows to train on, then `held_out` others."""

    source: str  # absolute path, or faces:N
    options: DataOptions
    files: Sequence[ImageFile]
    faces: Sequence[int]  # in their place, the numbers of those to draw
    held_out: int
    fingerprint: str
    identity: str
    folder_name: str

    @property
    def drawn(self) -> bool:
        return self.source.startswith("faces:")

    @property
    def count(self) -> int:
        return len(self.faces if self.drawn else self.files)

    @property
    def pixel_bytes(self) -> int:
        return self.count * self.options.size**2 * 3


def want(source: str, options: DataOptions, flag: str) -> Wanted:
    """What the cache of a folder, a zip or drawn faces is to hold."""
    if source.startswith("faces:"):
        return _want_faces(source, options, flag)
    collects = gc.isenabled()
    gc.disable()  # it would look again and again at objects that all stay: 0.4 of 1 s for 70,000
    try:
        return _want_files(Path(absolute(source, flag)), options, flag)
    finally:
        if collects:
            gc.enable()


def pixel_options(options: DataOptions) -> dict[str, Any]:
    """The options that the contents of a cache depend on."""
    return options.model_dump(include=PIXEL_OPTIONS)


def _want_faces(source: str, options: DataOptions, flag: str) -> Wanted:
    from . import faces

    match = re.fullmatch(r"faces:([0-9]{1,15})", source)
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{flag}: faces:N needs a whole number N, 1 or more; got {source[:99]}")
    for key in ("crop", "filter", "min_size", "max_pixels", "decoder"):
        if (value := getattr(options, key)) != getattr(DEFAULTS, key):
            raise UsageError(f"{flag_of(key)} {value} does not apply to drawn faces")
    count, held_out = int(match[1]), 0
    chosen = {key: getattr(options, key) for key in ("limit", "keep", "holdout")}
    numbers: Sequence[int] = range(count)
    if chosen != {key: getattr(DEFAULTS, key) for key in chosen}:
        if count > MOST_CHOSEN:
            raise UsageError(
                f"{flag}: N must be at most {MOST_CHOSEN:,} where some are chosen, got {source}"
            )
        numbers = take([str(number) for number in numbers], options.limit, options.keep)
        places, held_out = _held_out_last([str(i) for i in numbers], options, source, flag)
        numbers = [numbers[at] for at in places]
    about = ["faces", options.size, faces.FACES_VERSION, count, FACES_SEED]
    digest = _digest([about, chosen])
    name = f"faces-{count}-{options.size}px{_mark(chosen)}"
    return Wanted(f"faces:{count}", options, [], numbers, held_out, digest, digest, name)


def _want_files(path: Path, options: DataOptions, flag: str) -> Wanted:
    files = find_images(path, flag)
    files = [files[at] for at in take([f.name for f in files], options.limit, options.keep)]
    places, held_out = _held_out_last([f.name for f in files], options, str(path), flag)
    files = [files[at] for at in places]
    source = os.path.realpath(path)
    wishes = pixel_options(options)
    fingerprint = _digest(wishes, (list(file.row().values()) for file in files))
    timeless = (file.row() | {"mtime_ns": 0} for file in files)
    identity = _digest(wishes, (list(row.values()) for row in timeless))
    place = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    stem = slug(Path(source).stem if os.path.isfile(source) else Path(source).name, "images")
    name = f"{stem}-{options.size}px-{place}{_mark(wishes)}"
    return Wanted(source, options, files, [], held_out, fingerprint, identity, name)


def _held_out_last(
    names: list[str], options: DataOptions, source: str, flag: str
) -> tuple[list[int], int]:
    """The places of the names with those held out at the end, and how many these are."""
    apart = hold_out(names, options.holdout)
    places = sorted(range(len(names)), key=apart.__getitem__)
    if not names or all(apart):
        raise UsageError(
            f"{flag}: no image of {source} is left to train on by --keep {options.keep:g} "
            f"and --holdout {options.holdout:g}"
        )
    return places, sum(apart)


def _digest(about: Any, rows: Iterable[Any] = ()) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    waiting = iter(rows)
    while some := list(islice(waiting, 4096)):  # of a million files not all at once
        digest.update(json.dumps(some).encode())
    return digest.hexdigest()


def _mark(wishes: dict[str, Any]) -> str:
    """What tells caches of one source apart in their names; nothing for the defaults."""
    others = {
        key: value
        for key, value in wishes.items()
        if key != "size" and value != getattr(DEFAULTS, key)
    }
    return f"-{_digest(others)[:6]}" if others else ""
