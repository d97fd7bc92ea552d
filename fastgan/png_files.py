"""Many images as numbered PNG files, written by a few threads."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from . import console
from .durable import beside
from .env import cores
from .errors import RunError

AT_ONCE = 256  # images held in memory


def png_name(number: int, count: int) -> str:
    """000007.png; wider where `count` files need it, so that names sort as numbers."""
    return f"{number:0{max(6, len(str(count - 1)))}d}.png"


def write_pngs(images: Iterable[np.ndarray], folder: Path, count: int) -> None:
    """Write `count` images, uint8 [H, W, 3] each, as 000000.png, 000001.png, ... into `folder`.

    Raises:
        RunError: a file cannot be written.
    """

    def write(numbered: tuple[int, np.ndarray]) -> None:
        number, pixels = numbered
        with beside(folder / png_name(number, count)) as scratch:
            # level 1: a fifth larger than the default, several times faster
            Image.fromarray(pixels).save(scratch, compress_level=1)

    waiting = enumerate(images)
    done = 0
    # zlib lets go of the interpreter's lock
    with console.bar("writing", count) as bar, ThreadPoolExecutor(cores()) as pool:
        try:
            while part := list(islice(waiting, AT_ONCE)):
                done += len(list(pool.map(write, part)))
                bar.update(done)
        except OSError as error:
            raise RunError(f"{folder}: {error}; {done:,} of {count:,} images are whole") from None
