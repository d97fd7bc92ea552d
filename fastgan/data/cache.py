"""One uint8 memory map per (source, size): every image is decoded once, whatever is trained later.

A cache is a folder:

    images.npy      uint8 [N, size, size, 3], plain np.save layout, for np.load(mmap_mode="r")
    files.jsonl     name, size_bytes, mtime_ns of each image, in row order (empty for drawn faces)
    skipped.jsonl   the same and the reason, for each file that could not be decoded
    meta.json       what it was made from, and how; written last

It is built beside its place under a name of its own, flushed to disk, then renamed into place: a
cache that can be seen is a whole one. The fingerprint in meta.json covers everything that the
pixels depend on except the decoder, and decides whether a cache is used again or built anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..errors import RunError, UsageError

FORMAT = "fastgan-cache"
FORMAT_VERSION = 1
IMAGES, FILES, SKIPPED, META = "images.npy", "files.jsonl", "skipped.jsonl", "meta.json"
ROW = ("name", "size_bytes", "mtime_ns")  # of a file; see build.identity


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json."""

    size: int
    count: int
    crop: str
    filter: str
    decoder: str
    source: str  # absolute path, or faces:N
    fingerprint: str  # of all that the pixels depend on, times of change included
    identity: str  # the same without times: copied files are the same images in the same order
    created: str
    fastgan_version: str


@dataclass(frozen=True)
class Cache:
    """An open cache, checked to be whole."""

    path: Path
    meta: Meta
    images: np.memmap  # uint8 [N, size, size, 3], read-only


def open_cache(path: Path, flag: str = "--data") -> Cache:
    """Open a cache and check that its array is whole.

    Raises `UsageError` where there is no cache, `RunError` where it is damaged.
    """
    if not is_cache(path):
        raise UsageError(f"{flag}: {path} is not a cache (no {META} of {FORMAT} in it)")
    try:
        return read_cache(path)
    except DamagedError as damage:
        raise RunError(
            f"{flag}: the cache {path} is damaged: {damage}; "
            "delete it and run `fastgan prepare` again"
        ) from damage


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
            return Cache(path, meta, np.memmap(file, np.uint8, "r", start, shape))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def summary(cache: Cache) -> str:
    """A cache in a line: how many images, how large, and where."""
    return f"cache: {cache.meta.count:,} images of {cache.meta.size} px in {cache.path}"
