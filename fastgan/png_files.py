"""Many images as numbered PNG files, written by a few threads."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from . import console
from .durable import beside
from .env import cores
from .errors import RunError, UsageError

AHEAD, AHEAD_BYTES = 256, 1 << 28  # that wait to be written at most, while others are made


def png_name(number: int, count: int) -> str:
    """000007.png; wider where `count` files need it, so that names sort as numbers."""
    return f"{number:0{max(6, len(str(count - 1)))}d}.png"


def write_pngs(images: Iterable[np.ndarray], folder: Path, count: int) -> None:
    """Write `count` images, uint8 [H, W, 3] each, as 000000.png, 000001.png, ... into `folder`.

    Each is whole under its name, or not there, however the process ends. None is waited for until
    it is on the disk: after a power cut the last ones may be empty or gone.

    Raises:
        UsageError: another process is writing there, or has.
        RunError: a file cannot be written.
    """

    def write(number: int, pixels: np.ndarray) -> None:
        with beside(folder / png_name(number, count)) as scratch:
            # Runs alone at level 1: half of the time of Pillow's default, for files that are 1%
            # larger of photographs of 64 px and 6% of drawn faces (of 256 px 14%), and smaller
            # than level 1 makes them with matches
            Image.fromarray(pixels).save(scratch, compress_level=1, compress_type=zlib.Z_RLE)

    # zlib and the disk let go of the interpreter's lock
    threads, waiting, done = cores(), deque[Future[None]](), 0
    pool = ThreadPoolExecutor(threads)
    with _claimed(folder, png_name(0, count)), console.bar("writing", count) as bar:
        try:
            for number, pixels in enumerate(images):
                waiting.append(pool.submit(write, number, pixels))
                ahead = max(2 * threads, min(AHEAD, AHEAD_BYTES // pixels.nbytes))
                while len(waiting) > ahead or (waiting and waiting[0].done()):
                    waiting.popleft().result()
                    done += 1
                bar.update(done)
            while waiting:
                waiting.popleft().result()
                done += 1
                bar.update(done)
        except OSError as error:
            raise RunError(f"{folder}: {error}; {done:,} of {count:,} images are whole") from None
        except BaseException:
            console.warn(f"{folder}: {done:,} of {count:,} images are whole")
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _claimed(folder: Path, first: str) -> Iterator[None]:
    """The folder for this process alone, which has found it empty a moment ago."""
    claim = folder / ".writing"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        raise UsageError(f"{folder}: another process is writing into it") from None
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        if (folder / first).exists():
            raise UsageError(f"{folder} holds images already: take a new or an empty folder")
        yield
    finally:
        claim.unlink(missing_ok=True)
