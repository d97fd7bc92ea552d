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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from ..config import DataOptions
from ..errors import RunError, UsageError
from .image_file import open_regular

FORMAT = "fastgan-cache"
FORMAT_VERSION = 2  # raise also when the framing of any picture changes: caches are built anew
IMAGES, FILES, SKIPPED, META = "images.npy", "files.jsonl", "skipped.jsonl", "meta.json"
READ_BYTES = 16 << 20  # at a time
MAX_META_BYTES = 1 << 20


@checked(frozen=True, config=ConfigDict(strict=True))
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

    def digest(self) -> str:
        """SHA-256 of everything but the digests."""
        values = {key: value for key, value in asdict(self).items() if key != "sha256"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_META = TypeAdapter(Meta)


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
        meta = _read_meta(path)
    except PermissionError as error:
        raise UsageError(f"{path / META} cannot be read: {error.strerror}") from None
    except OSError:
        return False
    except ValueError:  # not JSON: a damaged cache, if all the rest of one is here
        return all((path / name).is_file() for name in (IMAGES, FILES, SKIPPED))
    return isinstance(meta, dict) and meta.get("format") == FORMAT


def _read_meta(path: Path) -> Any:
    """What meta.json holds; `ValueError` where it is no JSON, or far too long for one of ours."""
    with open_regular(path / META) as file:
        content = file.read(MAX_META_BYTES + 1)
    if len(content) > MAX_META_BYTES:
        raise ValueError(f"{META} is longer than any")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{META} is nested without end") from None


class DamagedError(Exception):
    """What is wrong with a cache's files."""


def read_cache(path: Path) -> Cache:
    """The cache at `path`, its array of the length that meta.json says; else `DamagedError`."""
    try:
        values = _read_meta(path)
        version = values["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UsageError(
                f"the cache {path} is of a newer fastgan (format {version}, this one knows "
                f"{FORMAT_VERSION}): name another place, or use that fastgan"
            )
        if version != FORMAT_VERSION:
            raise DamagedError(f"its format is version {version}, not {FORMAT_VERSION}")
        told = {field.name: values[field.name] for field in fields(Meta)}
        meta = _META.validate_json(json.dumps(told))  # as JSON, where an object may be strict
        DataOptions.model_validate(meta.options, strict=True)
        for name in (FILES, SKIPPED):
            open_regular(path / name).close()
        # Through one open file: another process may put a new cache in this place meanwhile.
        with open_regular(path / IMAGES) as file:
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
    except PermissionError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        found = error.errors()[0]
        raise DamagedError(f"{META}: {found['loc'][-1]}: {found['msg']}") from error
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
        if cache.meta.digest() != cache.meta.sha256.get(META):
            raise DamagedError(f"{META} is not what was written: its SHA-256 differs")
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
