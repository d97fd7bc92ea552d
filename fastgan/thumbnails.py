"""Pictures made small enough to stand in a page, as data: of a run's grids those that fit."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MOST = 30  # grids; more are no easier to follow
# The longer edge in pixels and WebP's quality, from the best to what always fits: 30 grids of 64
# faces of 64 px are 2.4 MB by the first.
LADDER = ((800, 85), (640, 75), (512, 65), (384, 55), (256, 40))


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def spread(count: int, most: int = MOST) -> list[int]:
    """The places of `most` of `count` things, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def thumbnails(
    paths: Sequence[Path], budget_bytes: int
) -> tuple[list[Thumbnail | None], list[str]]:
    """Each picture, alike in size and quality, so that all are within the budget; None where one
    cannot be read, and why.

    Where not even the smallest fit, those at the end are left out.
    """
    pictures: list[Image.Image | None] = []
    faults = []
    for path in paths:
        found = _read(path)
        pictures.append(None if isinstance(found, str) else found)
        if isinstance(found, str):
            faults.append(f"{path.name} {found}")
    for edge, quality in LADDER:
        made = [None if picture is None else _webp(picture, edge, quality) for picture in pictures]
        if sum(len(one.uri) for one in made if one is not None) <= budget_bytes:
            return made, faults
    left = budget_bytes
    for place, one in enumerate(made):
        left -= len(one.uri) if one is not None else 0
        if one is not None and left < 0:
            made[place] = None
            faults.append(f"{paths[place].name} is left out: the page would be too large")
    return made, faults


def _read(path: Path) -> Image.Image | str:
    """A PNG, no larger than is wanted, or why there is none."""
    edge = LADDER[0][0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as file:
                picture = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, MemoryError) as error:
        return f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return picture


def _webp(picture: Image.Image, edge: int, quality: int) -> Thumbnail:
    smaller = picture.copy()
    smaller.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    smaller.save(content, "WEBP", quality=quality)
    text = base64.b64encode(content.getvalue()).decode()
    return Thumbnail(f"data:image/webp;base64,{text}", *smaller.size)
