"""`fastgan faces`: drawn faces as PNG files, with the factors that made them."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from .. import console
from ..env import cores
from .faces import FACTOR_NAMES, factors, render

CHUNK = 64


def write_faces(folder: Path, count: int, size: int, seed: int) -> None:
    """`count` faces of `size` px as 000000.png, ... and factors.csv (a row a face) in an existing
    folder.
    """
    table = factors(count, seed)
    digits = max(6, len(str(count - 1)))
    names = [f"{i:0{digits}d}.png" for i in range(count)]
    with open(folder / "factors.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *FACTOR_NAMES])
        for name, row in zip(names, table, strict=True):
            writer.writerow([name, *(f"{value:.6g}" for value in row)])
    with console.bar("drawing", count) as shown, ThreadPoolExecutor(cores()) as pool:
        for start in range(0, count, CHUNK):
            images = render(table[start : start + CHUNK], size)
            pictures = [Image.fromarray(pixels) for pixels in images]
            paths = [folder / name for name in names[start : start + CHUNK]]
            list(pool.map(lambda picture, path: picture.save(path), pictures, paths))
            shown.update(start + len(images))
