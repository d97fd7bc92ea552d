"""Building a cache: every image drawn or decoded once, beside its place, then renamed into it.

Of two processes that build the same cache at once the second finds the first one's and drops its
own; what a killed one leaves behind is swept by the next. Nobody's own files are ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import __version__
from ..console import bar, say, warn
from ..durable import flush, flush_folder
from ..errors import RunError, UsageError
from .cache import (
    FILES,
    FORMAT,
    FORMAT_VERSION,
    IMAGES,
    META,
    ROW,
    SKIPPED,
    Cache,
    DamagedError,
    Meta,
    is_cache,
    read_cache,
    summary,
)
from .decode import CROP, FILTER, NO_GPU, open_decoder
from .images import ImageFile

FACES_SEED = 0
FACES_CHUNK = 512  # drawn at a time
BATCH = 128  # files decoded at a time
BATCH_BYTES = 64 << 20  # or fewer, when they are large
MAX_FILE_BYTES = 1 << 30  # 64 million pixels of 16-bit RGBA are half of this
READ_AHEAD = 4  # batches; on a network drive reading waits more than it works


@dataclass(frozen=True)
class Wanted:
    source: str
    size: int
    count: int  # files, or faces to draw
    files: list[ImageFile] | None  # None: faces
    fingerprint: str
    identity: str
    folder_name: str


def identity(file: ImageFile) -> list[Any]:
    return [file.name, file.size_bytes, file.mtime_ns]


def check_place(path: Path, flag: str) -> str | None:
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


def build(wanted: Wanted, path: Path, flag: str, place_flag: str) -> Cache:
    """Build the cache at `path`, replacing one that is there, and say what came of it.

    Raises:
        UsageError: `path` cannot be written, or none of the images can be decoded.
        RunError: the disk is too small or fails.
    """
    building = _sibling(path, "building")
    began = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        _check_room(wanted, path, place_flag)
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
            identity=wanted.identity,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fastgan_version=__version__,
        )
        text = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(meta)}
        with open(building / META, "w", encoding="utf-8") as file:
            file.write(json.dumps(text, indent=1) + "\n")
            flush(file)
        cache = _install(building, path, wanted.fingerprint)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"writing the cache {path} failed: {error}") from error
        raise RunError(_no_room(wanted, path, place_flag)) from error
    finally:
        _remove(building)
    seconds = time.monotonic() - began
    rate = wanted.count / max(seconds, 1e-9)
    by = filled.decoder + (f", {filled.by_pillow:,} by Pillow" if filled.by_pillow else "")
    say(f"{summary(cache)} ({seconds:.1f} s, {rate:,.0f} img/s, {by})")
    if filled.reasons:
        _say_skipped(filled.reasons, wanted.count, path)
    return cache


def _check_room(wanted: Wanted, path: Path, place_flag: str) -> None:
    """Stop before an hour of decoding that cannot fit."""
    if wanted.count * wanted.size**2 * 3 > shutil.disk_usage(path.parent).free:
        raise RunError(_no_room(wanted, path, place_flag))


def _no_room(wanted: Wanted, path: Path, place_flag: str) -> str:
    needed_gb = wanted.count * wanted.size**2 * 3 / 1e9
    return (
        f"no room for the cache {path}: it needs {needed_gb:,.2f} GB; "
        f"free some, or name another place with {place_flag}"
    )


@dataclass
class _Filled:
    """What came of the images that were wanted."""

    count: int
    decoder: str
    by_pillow: int  # of the count, decoded by Pillow in place of the decoder
    reasons: list[str]  # why the others were skipped


def _fill(building: Path, wanted: Wanted, flag: str) -> _Filled:
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
            flush(file)
    return filled


def _draw(images: IO[bytes], wanted: Wanted) -> _Filled:
    from . import faces

    with bar("drawing faces", wanted.count) as progress:
        for start in range(0, wanted.count, FACES_CHUNK):
            chunk = min(FACES_CHUNK, wanted.count - start)
            drawn = faces.draw_faces(chunk, wanted.size, seed=FACES_SEED, start=start)
            images.write(np.ascontiguousarray(drawn).data)
            progress.update(start + chunk)
    return _Filled(wanted.count, "drawn", 0, [])


def _decode(
    images: IO[bytes], kept: IO[str], skipped: IO[str], wanted: Wanted, flag: str
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
                row: dict[str, Any] = dict(zip(ROW, identity(file), strict=True))
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


def _install(building: Path, path: Path, fingerprint: str) -> Cache:
    """Rename a finished cache into place.

    Of two that finish at once, the second finds the first one's and drops its own.
    """
    flush_folder(building)
    # opened here: once in place, it may be replaced again
    own = replace(read_cache(building), path=path)
    retired = _sibling(path, "old")
    for _ in range(100):
        try:
            os.rename(building, path)  # replaces an empty folder, fails on any other
            flush_folder(path.parent)
            return own
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(DamagedError):
            cache = read_cache(path)
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


def _printable(name: str) -> str:
    """A file's name as it can be printed anywhere: stray bytes and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
