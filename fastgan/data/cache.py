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

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import __version__
from ..console import bar, say, warn
from ..errors import RunError, UsageError
from .decode import CROP, FILTER, NO_GPU, open_decoder
from .images import ImageFile, find_images

FORMAT = "fastgan-cache"
FORMAT_VERSION = 1
IMAGES, FILES, SKIPPED, META = "images.npy", "files.jsonl", "skipped.jsonl", "meta.json"
ROW = ("name", "size_bytes", "mtime_ns")  # of a file; see _identity

FACES_SEED = 0
FACES_CHUNK = 512  # drawn at a time
BATCH = 128  # files decoded at a time
BATCH_BYTES = 64 << 20  # or fewer, when they are large
MAX_FILE_BYTES = 1 << 30  # 64 million pixels of 16-bit RGBA are half of this
READ_AHEAD = 4  # batches; on a network drive reading waits more than it works


@dataclass(frozen=True)
class Meta:
    """The contents of meta.json."""

    size: int
    count: int
    crop: str
    filter: str
    decoder: str
    source: str  # absolute path, or faces:N
    fingerprint: str
    created: str
    fastgan_version: str


@dataclass(frozen=True)
class Cache:
    path: Path
    meta: Meta
    images: np.memmap  # uint8 [N, size, size, 3], read-only


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
    folder = Path(source).expanduser()
    if source.startswith("faces:"):
        wanted = _want_faces(source, size, flag)
    elif is_cache(folder):
        return _open_source(folder, size, out, flag)
    else:
        wanted = _want_folder(folder, size, flag)
    place_flag = "--out" if out is not None else "--cache"
    path = out.expanduser() if out is not None else (root or default_root()) / wanted.folder_name
    path = Path(os.path.realpath(path))  # a link in its place would be in the way of the rename
    reason = _check_place(path, place_flag)
    if reason is None:
        return _build(wanted, path, flag, place_flag)
    try:
        cache = _open(path)
        reason = _difference(cache, wanted)
    except DamagedError as damage:
        reason = f"the cache is damaged: {damage}"
    if reason:
        say(f"rebuilding {path}: {reason}")
        return _build(wanted, path, flag, place_flag)
    say(f"{_summary(cache)} (reused)")
    return cache


def open_cache(path: Path, flag: str = "--data") -> Cache:
    """Open a cache and check that its array is whole.

    Raises `UsageError` where there is no cache, `RunError` where it is damaged.
    """
    if not is_cache(path):
        raise UsageError(f"{flag}: {path} is not a cache (no {META} of {FORMAT} in it)")
    try:
        return _open(path)
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


def default_root() -> Path:
    """Where caches lie unless the user says otherwise."""
    if own := os.environ.get("FASTGAN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgan"


class DamagedError(Exception):
    """What is wrong with a cache's files."""


def _open_source(folder: Path, size: int, out: Path | None, flag: str) -> Cache:
    if out is not None:
        raise UsageError(f"--out cannot be used here: {flag} {folder} is a cache already")
    cache = open_cache(folder, flag)
    if cache.meta.size != size:
        raise UsageError(
            f"{flag}: the cache {folder} holds images of {cache.meta.size} px, but --size is {size}"
        )
    say(_summary(cache))
    return cache


def _open(path: Path) -> Cache:
    try:
        text = json.loads((path / META).read_text(encoding="utf-8"))
        if text["format_version"] != FORMAT_VERSION:
            raise DamagedError(f"its format is version {text['format_version']}, not 1")
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


def _summary(cache: Cache) -> str:
    return f"cache: {cache.meta.count:,} images of {cache.meta.size} px in {cache.path}"


# What is wanted, and how it differs from what is there


@dataclass(frozen=True)
class _Wanted:
    source: str
    size: int
    count: int  # files, or faces to draw
    files: list[ImageFile] | None  # None: faces
    fingerprint: str
    folder_name: str


def _want_faces(source: str, size: int, flag: str) -> _Wanted:
    from . import faces

    match = re.fullmatch(r"faces:([0-9]+)", source)
    if match is None or int(match[1]) < 1:
        raise UsageError(f"{flag}: faces:N needs a whole number N, 1 or more; got {source}")
    count = int(match[1])
    fingerprint = _fingerprint("faces", size, [[faces.FACES_VERSION, count, FACES_SEED]])
    return _Wanted(f"faces:{count}", size, count, None, fingerprint, f"faces-{count}-{size}px")


def _want_folder(folder: Path, size: int, flag: str) -> _Wanted:
    files = find_images(folder, flag)
    source = os.path.realpath(folder)
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(source).lower()).strip("-")[:40] or "images"
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    fingerprint = _fingerprint("folder", size, (_identity(file) for file in files))
    name = f"{slug}-{size}px-{digest}"
    return _Wanted(source, size, len(files), files, fingerprint, name)


def _identity(file: ImageFile) -> list[Any]:
    return [file.name, file.size_bytes, file.mtime_ns]


def _fingerprint(kind: str, size: int, items: Iterable[list[Any]]) -> str:
    digest = hashlib.sha256(json.dumps([kind, CROP, FILTER, size]).encode())
    for item in items:
        digest.update(json.dumps(item).encode())
    return digest.hexdigest()


def _difference(cache: Cache, wanted: _Wanted) -> str:
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
    now_there = {file.name: _identity(file) for file in wanted.files}
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


# Building


def _check_place(path: Path, flag: str) -> str | None:
    """None where nothing is in the way; "" where a cache is; raises for whatever else there is.

    A folder is only ever replaced when everything in it was written here: nobody's own files are
    deleted.
    """
    for parent in path.parents:
        if os.path.isdir(parent):
            break
        if os.path.lexists(parent):
            raise UsageError(f"{flag}: cannot make the cache {path}: {parent} is a file")
    if not os.path.lexists(path):
        return None
    if not path.is_dir():
        raise UsageError(f"{flag} must be a folder to write a cache to; {path} is a file")
    names = set(os.listdir(path))
    if not names:
        return None
    foreign = sorted(names - {IMAGES, FILES, SKIPPED, META})
    if foreign or not is_cache(path):
        shown = ", ".join(_printable(name) for name in (foreign or sorted(names))[:3])
        raise UsageError(
            f"{flag} must be a new folder, an empty one or a cache; "
            f"{path} holds other files ({shown})"
        )
    return ""


def _build(wanted: _Wanted, path: Path, flag: str, place_flag: str) -> Cache:
    building = _sibling(path, "building")
    began = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        building.mkdir()
    except OSError as error:
        raise UsageError(
            f"{place_flag}: cannot write the cache {path}: {error.strerror or error}"
        ) from error
    try:
        filled = _fill(building, wanted, flag)
        meta = Meta(
            size=wanted.size,
            count=filled.count,
            crop=CROP,
            filter=FILTER,
            decoder=filled.decoder,
            source=wanted.source,
            fingerprint=wanted.fingerprint,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fastgan_version=__version__,
        )
        text = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(meta)}
        with open(building / META, "w", encoding="utf-8") as file:
            file.write(json.dumps(text, indent=1) + "\n")
            _flush(file)
        cache = _install(building, path, wanted.fingerprint)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"writing the cache {path} failed: {error}") from error
        needed_gb = wanted.count * wanted.size**2 * 3 / 1e9
        raise RunError(
            f"no room for the cache {path}: it needs {needed_gb:,.2f} GB; "
            f"free some, or name another place with {place_flag}"
        ) from error
    finally:
        _remove(building)
    seconds = time.monotonic() - began
    rate = wanted.count / max(seconds, 1e-9)
    by = filled.decoder + (f", {filled.by_pillow:,} by Pillow" if filled.by_pillow else "")
    say(f"{_summary(cache)} ({seconds:.1f} s, {rate:,.0f} img/s, {by})")
    if filled.reasons:
        _say_skipped(filled.reasons, wanted.count, path)
    return cache


@dataclass
class _Filled:
    """What came of the images that were wanted."""

    count: int
    decoder: str
    by_pillow: int  # of the count, decoded by Pillow in place of the decoder
    reasons: list[str]  # why the others were skipped


def _fill(building: Path, wanted: _Wanted, flag: str) -> _Filled:
    """Write everything but meta.json."""
    with (
        open(building / IMAGES, "wb") as images,
        open(building / FILES, "w", encoding="utf-8") as kept,
        open(building / SKIPPED, "w", encoding="utf-8") as skipped,
    ):
        header = _npy_header(wanted.count, wanted.size)
        images.write(header)
        if wanted.files is None:
            filled = _draw(images, wanted)
        else:
            filled = _decode(images, kept, skipped, wanted, flag)
        images.seek(0)
        final = _npy_header(filled.count, wanted.size)
        assert len(final) == len(header)  # numpy leaves room for any count
        images.write(final)
        for file in (images, kept, skipped):
            _flush(file)
    return filled


def _draw(images: IO[bytes], wanted: _Wanted) -> _Filled:
    from . import faces

    with bar("drawing faces", wanted.count) as progress:
        for start in range(0, wanted.count, FACES_CHUNK):
            chunk = min(FACES_CHUNK, wanted.count - start)
            drawn = faces.draw_faces(chunk, wanted.size, seed=FACES_SEED, start=start)
            images.write(np.ascontiguousarray(drawn).data)
            progress.update(start + chunk)
    return _Filled(wanted.count, "drawn", 0, [])


def _decode(
    images: IO[bytes], kept: IO[str], skipped: IO[str], wanted: _Wanted, flag: str
) -> _Filled:
    assert wanted.files is not None
    decoder = open_decoder(wanted.size)
    tell = say if decoder.why in ("", NO_GPU) else warn
    tell(f"decoding with {decoder.name}{' (' + decoder.why + ')' if decoder.why else ''}")
    reasons: list[str] = []
    first_bad: list[str] = []
    done = 0
    with bar("decoding", wanted.count) as progress:
        for files, blobs in _read_ahead(wanted.files):
            decoded = iter(decoder.decode([blob for blob in blobs if isinstance(blob, bytes)]))
            squares = []
            for file, blob in zip(files, blobs, strict=True):
                result = next(decoded) if isinstance(blob, bytes) else blob
                row: dict[str, Any] = dict(zip(ROW, _identity(file), strict=True))
                if isinstance(result, str):
                    reasons.append(result)
                    skipped.write(json.dumps({**row, "reason": result}) + "\n")
                    if len(first_bad) < 3:
                        first_bad.append(f"{_printable(file.name)}: {result}")
                else:
                    squares.append(result)
                    kept.write(json.dumps(row) + "\n")
            if squares:
                images.write(np.stack(squares).data)
            done += len(files)
            progress.update(done)
    if done == len(reasons):
        raise UsageError(
            f"{flag}: none of the {done:,} images in {wanted.source} can be decoded: "
            + "; ".join(first_bad)
        )
    return _Filled(done - len(reasons), decoder.name, decoder.by_pillow, reasons)


def _read_ahead(files: list[ImageFile]) -> Iterator[tuple[list[ImageFile], list[bytes | str]]]:
    """Batches of files and their bytes (or why there are none), read while others are decoded."""
    batches = _batches(files)
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read") as threads:
        waiting = deque(
            (batch, threads.submit(_read, batch)) for batch in islice(batches, READ_AHEAD)
        )
        while waiting:
            batch, blobs = waiting.popleft()
            ready = blobs.result()
            for following in islice(batches, 1):
                waiting.append((following, threads.submit(_read, following)))
            yield batch, ready


def _batches(files: list[ImageFile]) -> Iterator[list[ImageFile]]:
    batch: list[ImageFile] = []
    batch_bytes = 0
    for file in files:
        if batch and (len(batch) == BATCH or batch_bytes + file.size_bytes > BATCH_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(file)
        batch_bytes += file.size_bytes
    yield batch


def _read(batch: list[ImageFile]) -> list[bytes | str]:
    blobs: list[bytes | str] = []
    for file in batch:
        if file.size_bytes > MAX_FILE_BYTES:
            blobs.append(f"too large: {file.size_bytes:,} bytes, over {MAX_FILE_BYTES:,}")
            continue
        try:
            blobs.append(file.path.read_bytes())
        except OSError as error:
            blobs.append(f"unreadable: {error.strerror or error}")
    return blobs


def _say_skipped(reasons: list[str], total: int, path: Path) -> None:
    kinds = Counter(reason.partition(":")[0] for reason in reasons).most_common()
    shown = [f"{count:,} {kind}" for kind, count in kinds[:3]]
    if len(kinds) > 3:
        shown.append(f"{sum(count for _, count in kinds[3:]):,} other")
    where = path / SKIPPED
    say(f"skipped {len(reasons):,} of {total:,} files: {', '.join(shown)}; names in {where}")


# The folder's place


def _install(building: Path, path: Path, fingerprint: str) -> Cache:
    """Rename a finished cache into place.

    Of two that finish at once, the second finds the first one's and drops its own.
    """
    _flush_folder(building)
    own = replace(
        _open(building), path=path
    )  # opened here: once in place, it may be replaced again
    retired = _sibling(path, "old")
    for _ in range(100):
        try:
            os.rename(building, path)  # replaces an empty folder, fails on any other
            _flush_folder(path.parent)
            return own
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(DamagedError):
            cache = _open(path)
            if cache.meta.fingerprint == fingerprint:
                return cache
        with contextlib.suppress(FileNotFoundError):  # another process may have retired it
            os.rename(path, retired)
        _remove(retired)
    raise RunError(f"writing the cache {path} failed: other processes keep replacing it")


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}"


def _sweep(path: Path) -> None:
    """Remove what processes of this host left behind when they were killed.

    One with our own number is a leftover too: in containers the numbers repeat.
    """
    for kind in ("building", "old"):
        own = _sibling(path, kind).name
        prefix = own[: own.rindex("-") + 1]
        for name in os.listdir(path.parent):
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdecimal():
                pid = int(number)
                if pid == os.getpid() or not _alive(pid):
                    _remove(path.parent / name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(folder: Path) -> None:
    """Delete the files that a cache consists of and the folder, if nothing else is in it."""
    for name in (META, IMAGES, FILES, SKIPPED):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _npy_header(count: int, size: int) -> bytes:
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _printable(name: str) -> str:
    """A file's name as it can be printed anywhere: stray bytes and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
