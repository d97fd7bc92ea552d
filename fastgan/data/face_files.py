"""`fastgan faces`: drawn faces as PNG files, with the factors that made them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import RunError
from ..png_files import png_name, write_pngs
from .faces import FACTOR_NAMES, factors, render

DRAWN_PIXELS = 1 << 24  # at a time: 48 MB of RGB


def write_faces(folder: Path, count: int, size: int, seed: int) -> None:
    """`count` faces of `size` px as 000000.png, ... and factors.csv (a row a face) in a folder.

    Raises:
        RunError: a file cannot be written.
    """
    table = factors(count, seed)
    try:
        with open(folder / "factors.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *FACTOR_NAMES])
            for i, row in enumerate(table):
                writer.writerow([png_name(i, count), *(f"{value:.6g}" for value in row)])
    except OSError as error:
        raise RunError(f"{folder}: {error}") from None
    write_pngs(_drawn(table, size), folder, count)


def _drawn(table: np.ndarray, size: int) -> Iterator[np.ndarray]:
    chunk = max(1, DRAWN_PIXELS // size**2)
    for start in range(0, len(table), chunk):
        yield from render(table[start : start + chunk], size)
