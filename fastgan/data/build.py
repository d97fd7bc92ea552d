"""Building a cache: every image drawn or decoded once, beside its place, then renamed into it.

A killed build starts anew: what it leaves behind is swept by the next. Of two processes that want
the same cache the second waits for the first (`prepare.py`); where the file system has no locks
both build, and the later finds the first one's and drops its own. Nobody's own files are ever
deleted.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import __version__
from ..console import bar, say
from ..durable import flush
from ..errors import RunError, UsageError
from .cache import (
    FILES,
    FORMAT,
    FORMAT_VERSION,
    IMAGES,
    META,
    SKIPPED,
    Cache,
    Meta,
    file_digest,
    summary,
)
from .image_file import printable
from .place import install, meta_text, remove, sibling, sweep
from .pool import batches, open_pool
from .wanted import FACES_SEED, Wanted, pixel_options

FACES_CHUNK = 512  # drawn at a time


def build(wanted: Wanted, path: Path, flag: str, place_flag: str, *, alone: bool = False) -> Cache:
    """Build the cache at `path`, in a folder that is there, replacing one in its place, and say
    what came of it.

    `alone` says that no other process of this host is at it.

    Raises:
        OSError: the folder cannot be written to.
        UsageError: more than half of the images, or with `on_bad` stop one, is refused.
        RunError: the disk is too small or fails.
    """
    building, replaced = sibling(path, "building"), meta_text(path)
    began = time.monotonic()
    sweep(path, alone)
    _check_room(wanted, path, place_flag)
    building.mkdir()
    try:
        filled = _Filled(wanted)
        _fill(filled, building, flag)
        meta = Meta(
            count=filled.count,
            held_out=filled.held_out,
            options=pixel_options(wanted.options),
            decoder=filled.decoder,
            source=wanted.source,
            fingerprint=wanted.fingerprint,
            identity=wanted.identity,
            sha256={name: file_digest(building / name) for name in (FILES, SKIPPED)}
            | {IMAGES: filled.digest.hexdigest()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fastgan_version=__version__,
        )
        meta.sha256[META] = meta.digest()
        text = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(meta)}
        with open(building / META, "w", encoding="utf-8") as file:
            file.write(json.dumps(text, indent=1) + "\n")
            flush(file)
        cache = install(building, path, wanted.fingerprint, replaced)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"writing the cache {path} failed: {error}") from error
        raise RunError(_no_room(wanted, path, place_flag)) from error
    finally:
        remove(building)
    seconds = time.monotonic() - began
    rate = wanted.count / max(seconds, 1e-9)
    by = filled.decoder + (f", {filled.by_pillow:,} by Pillow" if filled.by_pillow else "")
    say(f"{summary(cache)} ({seconds:.1f} s, {rate:,.0f} img/s, {by})")
    filled.report(path)
    return cache


def _check_room(wanted: Wanted, path: Path, place_flag: str) -> None:
    """Stop before an hour of decoding that cannot fit."""
    if wanted.pixel_bytes > shutil.disk_usage(path.parent).free:
        raise RunError(_no_room(wanted, path, place_flag))


def _no_room(wanted: Wanted, path: Path, place_flag: str) -> str:
    return (
        f"no room for the cache {path}: it needs {_amount(wanted.pixel_bytes)}; "
        f"free some, or name another place with {place_flag}"
    )


def _amount(count_bytes: int) -> str:
    mb = count_bytes / 1e6
    return f"{mb / 1000:,.2f} GB" if mb >= 1000 else f"{mb:,.2f} MB"


@dataclass
class _Filled:
    """What came of the images that were wanted, so far."""

    wanted: Wanted
    count: int = 0  # written
    held_out: int = 0  # of these
    decoder: str = "drawn"
    by_pillow: int = 0  # decoded by Pillow in place of the decoder
    enlarged: int = 0  # smaller than what was made of them
    refused: Counter[str] = field(default_factory=Counter)  # by the kind of reason
    examples: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)  # of the pixels

    def write(self, file: IO[bytes], squares: np.ndarray) -> None:
        pixels = np.ascontiguousarray(squares).data
        file.write(pixels)
        self.digest.update(pixels)

    def refuse(self, name: str, reason: str, flag: str) -> None:
        """Count a refusal; `UsageError` where it is one too many."""
        total = self.wanted.count
        if self.wanted.options.on_bad == "stop":
            raise UsageError(
                f"{flag}: {printable(name)}: {reason} (--on-bad skip leaves such files out)"
            )
        self.refused[reason.partition(":")[0]] += 1
        if len(self.examples) < 3:
            self.examples.append(f"{printable(name)}: {reason}")
        if 2 * self.refused.total() > total:
            raise UsageError(
                f"{flag}: {self.refused.total():,} of {total:,} images in {self.wanted.source} "
                f"are refused, more than half ({self._kinds()}): {'; '.join(self.examples)}"
            )

    def _kinds(self) -> str:
        """The three commonest kinds of reasons, with their counts."""
        kinds = self.refused.most_common()
        shown = [f"{count:,} {kind}" for kind, count in kinds[:3]]
        if len(kinds) > 3:
            shown.append(f"{sum(count for _, count in kinds[3:]):,} other")
        return ", ".join(shown)

    def report(self, path: Path) -> None:
        """Say what was refused and why, and what was enlarged."""
        total, size = self.wanted.count, self.wanted.options.size
        if self.refused:
            say(
                f"skipped {self.refused.total():,} of {total:,} files: {self._kinds()}; "
                f"names in {path / SKIPPED}"
            )
        if self.enlarged:
            say(
                f"enlarged {self.enlarged:,} images of fewer than {size} pixels a side "
                f"(--min-size {size} would refuse them)"
            )


def _fill(filled: _Filled, building: Path, flag: str) -> None:
    """Write everything but meta.json, and count."""
    wanted = filled.wanted
    with (
        open(building / IMAGES, "wb") as images,
        open(building / FILES, "w", encoding="utf-8") as kept,
        open(building / SKIPPED, "w", encoding="utf-8") as skipped,
    ):
        room = len(_npy_header(wanted.count, wanted.options.size))
        images.seek(room)
        if wanted.drawn:
            _draw(filled, images)
        else:
            _decode(filled, images, kept, skipped, flag)
        header = _npy_header(filled.count, wanted.options.size)
        assert len(header) == room  # numpy leaves room for any count
        images.seek(0)
        images.write(header)
        for file in (images, kept, skipped):
            flush(file)


def _draw(filled: _Filled, images: IO[bytes]) -> None:
    from . import faces

    wanted = filled.wanted
    numbers = wanted.faces
    with bar("drawing faces", len(numbers)) as progress:
        for start in range(0, len(numbers), FACES_CHUNK):
            chunk = numbers[start : start + FACES_CHUNK]
            if isinstance(chunk, range):
                rows = faces.factor_rows(start, len(chunk), FACES_SEED)
            else:
                rows = np.concatenate([faces.factor_rows(n, 1, FACES_SEED) for n in chunk])
            filled.write(images, faces.render(rows, wanted.options.size))
            progress.update(start + len(chunk))
    filled.count, filled.held_out = len(numbers), wanted.held_out


def _decode(filled: _Filled, images: IO[bytes], kept: IO[str], skipped: IO[str], flag: str) -> None:
    wanted = filled.wanted
    files = wanted.files
    trained = len(files) - wanted.held_out
    done = 0
    with open_pool(wanted.options, files) as pool, bar("decoding", len(files)) as progress:
        filled.decoder = pool.name
        for decoded in pool.run(batches(files)):
            for reason, digest in zip(decoded.reasons, decoded.digests, strict=True):
                row = {**files[done].row(), "sha256": digest}
                if reason is None:
                    kept.write(json.dumps(row) + "\n")
                    filled.count += 1
                    filled.held_out += done >= trained
                else:
                    skipped.write(json.dumps({**row, "reason": reason}) + "\n")
                    filled.refuse(files[done].name, reason, flag)
                done += 1
            filled.write(images, decoded.squares)
            progress.update(done)
        filled.by_pillow, filled.enlarged = pool.by_pillow, pool.enlarged
    if filled.count == filled.held_out:
        raise UsageError(f"{flag}: no image of {wanted.source} is left to train on")


def _npy_header(count: int, size: int) -> bytes:
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.getvalue()
