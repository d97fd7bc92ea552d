"""One uint8 memory map per (source, framing): images are decoded once, whatever is trained later.

A cache is a folder:

    images.npy      uint8 [N, size, size, 3], plain np.save layout, for np.load(mmap_mode="r"):
                    the images to train on, then those held out, each by the bytes of their names
    files.jsonl     name, size_bytes, mtime_ns and sha256 of each image, in row order (of a member
                    of a zip its crc32, too; nothing for drawn faces)
    skipped.jsonl   the same and the reason, for each file that was refused
    meta.json       what it was made from, and how; written last

It is built beside its place under a name of its own, flushed to disk, then renamed into place: a
cache that can be seen is a whole one. The fingerprint in meta.json covers everything that the
pixels depend on, except for the decoder unless one was asked for by name: they agree within a level
or so, and machines with and without a GPU may share a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError, UsageError

FORMAT = "fastgan-cache"
FORMAT_VERSION = 2
IMAGES, FILES, SKIPPED, META = "images.npy", "files.jsonl", "skipped.jsonl", "meta.json"
READ_BYTES = 16 << 20  # at a time


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json."""

    count: int  # images, those held out included
    held_out: int
    options: dict[str, Any]  # config.DataOptions, without those that change no pixel
    decoder: str
    source: str  # absolute path, or faces:N
    fingerprint: str  # of all that the pixels depend on, times of change included
    identity: str  # the same without times: copied files are the same images in the same order
    sha256: dict[str, str]  # of the other files by name; of images.npy, of its pixels
    created: str
    fastgan_version: str

    @property
    def size(self) -> int:
        return int(self.options["size"])


@dataclass(frozen=True)
class Cache:
    """An open cache, checked to be whole."""

    path: Path
    meta: Meta
    images: np.memmap  # uint8 [N, size, size, 3] to train on, read-only
    held_out: np.memmap  # the rest, which training never sees

    @property
    def count(self) -> int:
        """Images to train on."""
        return len(self.images)

    @property
    def identity(self) -> str:
        return self.meta.identity

    def pictures(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows: uint8 [n, size, size, 3]."""
        return np.asarray(self.images[rows])

    def close(self) -> None:
        """Nothing is held but the map, which goes with its last reader."""

    def __str__(self) -> str:
        return f"{self.count:,} images of {self.meta.size} px from {self.path}"


def open_cache(path: Path, flag: str = "--data") -> Cache:
    """Open a cache and check that its array is whole.

    Raises `UsageError` where there is no cache, `RunError` where it is damaged.
    """
    if not is_cache(path):
        raise UsageError(f"{flag}: {path} is not a cache (no {META} of {FORMAT} in it)")
    try:
        return read_cache(path)
    except DamagedError as damage:
        raise _damaged(path, flag, damage) from damage


def _damaged(path: Path, flag: str, damage: Exception) -> RunError:
    return RunError(
        f"{flag}: the cache {path} is damaged: {damage}; delete it and run `fastgan prepare` again"
    )


def is_cache(path: Path) -> bool:
    """Whether `path` is a cache, be it a damaged one."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:  # not JSON: a damaged cache, if all the rest of one is here
        return all((path / name).is_file() for name in (IMAGES, FILES, SKIPPED))
    return isinstance(meta, dict) and meta.get("format") == FORMAT


class DamagedError(Exception):
    """What is wrong with a cache's files."""


def read_cache(path: Path) -> Cache:
    """The cache at `path`, its array of the length that meta.json says; else `DamagedError`."""
    try:
        text = json.loads((path / META).read_text(encoding="utf-8"))
        if text["format_version"] != FORMAT_VERSION:
            raise DamagedError(
                f"its format is version {text['format_version']}, not {FORMAT_VERSION}"
            )
        meta = Meta(**{field.name: text[field.name] for field in fields(Meta)})
        # Through one open file: another process may put a new cache in this place meanwhile.
        with open(path / IMAGES, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            expected_bytes = start + meta.count * meta.size**2 * 3
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != expected_bytes:
                raise DamagedError(
                    f"{IMAGES} has {found_bytes:,} bytes where {expected_bytes:,} belong"
                )
            if shape != (meta.count, meta.size, meta.size, 3) or dtype != np.uint8:
                raise DamagedError(f"{IMAGES} is {dtype} {list(shape)}")
            # Read-only, not copy-on-write: the kernel refuses private maps larger than the memory.
            rows: Any = np.memmap(file, np.uint8, "r", start, shape)
            trained = meta.count - meta.held_out
            if not 0 < trained <= meta.count:
                raise DamagedError(f"{META} counts {meta.held_out} held out of {meta.count} images")
            return Cache(path, meta, rows[:trained], rows[trained:])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def check_cache(path: Path, flag: str = "--data") -> Cache:
    """Open a cache and read all of it: every file as its checksum says, a row for each image.

    Raises as `open_cache` does.
    """
    cache = open_cache(path, flag)
    try:
        for name, start in ((IMAGES, cache.images.offset), (FILES, 0), (SKIPPED, 0)):
            if file_digest(path / name, start) != cache.meta.sha256.get(name):
                raise DamagedError(f"{name} is not what was written: its SHA-256 differs")
        count = cache.meta.count
        rows = (path / FILES).read_bytes().count(b"\n")
        if rows != (0 if cache.meta.source.startswith("faces:") else count):
            raise DamagedError(f"{FILES} has {rows:,} rows for {count:,} images")
    except (OSError, DamagedError) as damage:
        raise _damaged(path, flag, damage) from damage
    return cache


def file_digest(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from a place in it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def summary(cache: Cache) -> str:
    """A cache in a line: how many images, how large, and where."""
    apart = f" and {len(cache.held_out):,} held out" if len(cache.held_out) else ""
    return f"cache: {len(cache.images):,} images of {cache.meta.size} px{apart} in {cache.path}"
