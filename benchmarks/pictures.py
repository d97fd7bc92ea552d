"""The files that the data path is measured on, and the square that each is to become.

Drawn faces with the noise of a camera, without which a PNG of them would be a tenth as long; a few,
under many names, of which no decoder keeps anything. FASTGAN_FACES may name a folder of JPEGs of
200 x 200 px to take instead of drawn ones.
"""

from __future__ import annotations

import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from fastgan.data.faces import draw_faces

DISTINCT = 7  # divides no batch: pictures in a wrong order are seen
SEED = 7
LIMIT = 0.5  # levels, on average, between two ways to the same squares; one tells 10 and more apart
# the suffix, the deviation of the noise in levels, and how it is saved
FORMS = {
    "JPEG": (".jpg", 2.0, {"quality": 75}),  # 200 px: 6 KB, as the real ones
    "PNG": (".png", 1.25, {}),  # 1024 px: 1.3 MB, as FFHQ's
}


def drawn(folder: Path, form: str, edge: int) -> list[Path]:
    """A few distinct faces as files."""
    suffix, deviation, options = FORMS[form]
    faces = draw_faces(DISTINCT, max(edge, 16))
    noise = np.random.default_rng(SEED).normal(0, deviation, faces.shape)
    pictures = (faces + noise).round().clip(0, 255).astype(np.uint8)
    folder.mkdir(parents=True)
    paths = [folder / f"{i}{suffix}" for i in range(DISTINCT)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path, **options)
    return paths


def jpeg_faces(folder: Path, at_most: int) -> tuple[list[Path], str]:
    """JPEGs of 200 px, and what they are: copies of those in FASTGAN_FACES, or drawn ones."""
    given = os.environ.get("FASTGAN_FACES")
    if not given:
        return drawn(folder, "JPEG", 200), "drawn"
    found = (p for p in sorted(Path(given).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg"))
    folder.mkdir(parents=True)
    paths = []
    for i, path in enumerate(islice(found, at_most)):
        paths.append(folder / f"{i:06d}.jpg")
        shutil.copyfile(path, paths[-1])
    assert paths, f"FASTGAN_FACES: no .jpg in {given}"
    return paths, "photographs"


def repeated(files: list[Path], folder: Path, count: int, a_folder: int = 1_000_000) -> list[Path]:
    """`count` names for the files in turn, as hard links, numbered and in folders of `a_folder` as
    FFHQ's are; in the order of fastgan and of ImageFolder.
    """
    paths = []
    for i in range(count):
        source = files[i % len(files)]
        place = folder / f"{i // a_folder * a_folder:05d}"
        if i % a_folder == 0:
            place.mkdir(parents=True)
        paths.append(place / f"{i:06d}{source.suffix}")
        try:
            os.link(source, paths[-1])
        except OSError:  # no links here, or no more to this file
            shutil.copyfile(source, paths[-1])
    return paths


def framed_ref(path: Path, size: int) -> np.ndarray:
    """The definition, by Pillow: the largest centred square, by the triangular filter."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    edge = min(picture.size)
    left, top = ((side - edge) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + edge, top + edge))
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def check_squares(name: str, got: np.ndarray, expected: np.ndarray) -> float:
    """The mean error in levels.

    Raises:
        AssertionError: it is over LIMIT for all or for any one of them, or some are missing.
    """
    assert got.dtype == np.uint8 and got.shape == expected.shape, f"{name}: {got.dtype} {got.shape}"
    errors = np.array(
        [np.abs(a.astype(int) - b).mean() for a, b in zip(got, expected, strict=True)]
    )
    worst = int(errors.argmax())
    assert errors[worst] <= 2 * LIMIT and errors.mean() <= LIMIT, (
        f"{name}: {errors.mean():.2f} levels apart, picture {worst} {errors[worst]:.2f}"
    )
    return float(errors.mean())
