"""PNGs of 8-bit RGB by kornia-rs (Rust's `png`): a third of the time of libpng, the same pixels."""

from __future__ import annotations

import io
import struct
from typing import Literal

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB8 = b"\x08\x02"  # depth and colour type, as the header has them

Route = Literal["rgb8", "other", "odd"]


class PngDecoder:
    """Decodes what `png_route` calls rgb8.

    Attributes:
        lack: why it does nothing here; "" where it works.
    """

    def __init__(self) -> None:
        self.lack = ""
        try:
            from kornia_rs import io as kornia

            self._decode = kornia.decode_image_png_u8
            picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            if not np.array_equal(self._decode(file.getvalue(), (5, 7), "rgb"), picture):
                raise ValueError("it decodes a known PNG wrongly")
        except Exception as error:  # not installed, or of a version that has it elsewhere
            self.lack = f"no kornia-rs, PNGs take three times as long: {error}"

    def decode(self, blob: bytes) -> np.ndarray | None:
        """uint8 [H, W, 3], or None for a file that it refuses."""
        width, height = png_sides(blob)
        try:
            return np.asarray(self._decode(blob, (height, width), "rgb"))
        except Exception:  # it has no type of its own for a damaged file
            return None


def png_sides(blob: bytes) -> tuple[int, int]:
    """Width and height, as the header has them."""
    width, height = struct.unpack_from(">II", blob, 16)
    return width, height


def png_route(blob: bytes) -> Route:
    """What may decode a PNG, from its chunks: any decoder and this one (rgb8), any other, or only
    one that is careful (odd).

    rgb8 is 8-bit RGB without transparency and orientation. Odd are animations, of which DALI gives
    the first frame, which need not be the picture; and what does not end with IEND inside the file:
    DALI allocates what a chunk's length says before it reads, up to 5 GB for a file of 116 bytes.
    """
    plain = blob[24:26] == RGB8
    at = len(SIGNATURE)
    while at + 12 <= len(blob):
        length, kind = int.from_bytes(blob[at : at + 4], "big"), blob[at + 4 : at + 8]
        if length > len(blob) - at - 12 or kind == b"acTL":
            return "odd"
        if kind in (b"tRNS", b"eXIf"):
            plain = False
        if kind == b"IEND":
            return "rgb8" if plain else "other"
        at += 12 + length
    return "odd"
