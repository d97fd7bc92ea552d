"""`fastgan faces`: drawn faces as PNG files, with the factors that made them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..durable import beside
from ..errors import RunError
from ..png_files import png_name, write_pngs
from .faces import FACTOR_NAMES, factor_rows, render

DRAWN_PIXELS = 1 << 24  # at a time: 48 MB of RGB
ROWS = 4096  # of factors at a time


def write_faces(folder: Path, count: int, size: int, seed: int) -> None:
    """`count` faces of `size` px as 000000.png, ..., then factors.csv with a row a face.

    Raises:
        RunError: a file cannot be written.
    """
    write_pngs(_drawn(count, size, seed), folder, count)
    try:
        with beside(folder / "factors.csv") as scratch, open(scratch, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *FACTOR_NAMES])
            for start in range(0, count, ROWS):
                for i, row in enumerate(factor_rows(start, min(ROWS, count - start), seed), start):
                    writer.writerow([png_name(i, count), *(f"{value:.6g}" for value in row)])
    except OSError as error:
        raise RunError(f"{folder}: {error}") from None


def _drawn(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    chunk = max(1, DRAWN_PIXELS // size**2)
    for start in range(0, count, chunk):
        yield from render(factor_rows(start, min(chunk, count - start), seed), size)
