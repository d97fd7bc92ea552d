"""How a picture becomes a square of the set: which part is kept, by which filter it is resized, and
which pictures are refused for their sides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Filter = Literal["triangular", "lanczos", "cubic"]
MAX_SIDE = 65535  # of a JPEG
_RECTANGLE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})(?:\+([0-9]{1,5})\+([0-9]{1,5}))?")


class Box(NamedTuple):
    """A part of a picture, in pixels from its top left corner."""

    left: int
    top: int
    width: int
    height: int


class Crop:
    """What is kept of a picture, from its notation.

    `center` is the largest centred square, `none` the whole picture, `WxH` that many pixels from
    the centre, `WxH+X+Y` that many from X, Y. What is centred begins at floor((side - part) / 2).
    Raises `ValueError` for any other notation.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._sides: tuple[int, int] | None = None
        self._corner: tuple[int, int] | None = None
        if text in ("center", "none"):
            return
        found = _RECTANGLE.fullmatch(text)
        if found is None or not int(found[1]) or not int(found[2]):
            raise ValueError(f"must be center, none, WxH or WxH+X+Y in pixels, got {text!r}")
        self._sides = int(found[1]), int(found[2])
        if found[3] is not None:
            self._corner = int(found[3]), int(found[4])

    def box(self, width: int, height: int) -> Box | None:
        """The part of a picture of these sides; None where it is not inside."""
        if self.text == "none":
            return Box(0, 0, width, height)
        w, h = self._sides or (min(width, height),) * 2
        left, top = self._corner or ((width - w) // 2, (height - h) // 2)
        inside = min(left, top) >= 0 and left + w <= width and top + h <= height
        return Box(left, top, w, h) if inside else None


_parsed = lru_cache(Crop)


@dataclass(frozen=True)
class Framing:
    """From pictures of any sides to squares of `size` pixels."""

    size: int = 64
    crop: str = "center"  # see Crop
    filter: Filter = "triangular"
    min_size: int = 1  # of the shorter side
    max_pixels: int = 64_000_000  # an 8 KB JPEG can claim 400 million, and cost seconds

    def too_large(self, width: int, height: int) -> str:
        """Why a picture of these sides is not to be decoded, or ""."""
        if width * height <= self.max_pixels:
            return ""
        return f"too large: {width}x{height} is over {self.max_pixels:,} pixels (--max-pixels)"

    def box(self, width: int, height: int) -> Box | str:
        """The part that is kept of an upright picture of these sides, or why there is none."""
        if min(width, height) < self.min_size:
            return f"too small: {width}x{height} is under {self.min_size} pixels (--min-size)"
        return _parsed(self.crop).box(width, height) or (
            f"too small: {width}x{height} does not hold --crop {self.crop}"
        )
