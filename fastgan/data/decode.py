"""Image files, as bytes, to uint8 RGB squares: the decoders and the choice among them.

Framing, the same in every decoder: EXIF orientation applied, the crop cut out, then an antialiased
resize. Alpha is dropped without blending, 16-bit samples become round(x / 257). DALI and Pillow
agree bit for bit on JPEG and PNG pixels. After a triangular resize they are within one level of
each other, except in the two outermost rows and columns: there DALI repeats the border pixel where
Pillow cuts the kernel off. Cubic and lanczos do the same over a border of their radius, and
overshoot where a picture hardly shrinks, which Pillow clips between its two passes: one pixel in a
hundred differs by a few levels there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import RunError
from ..framing import Framing
from .dali_decoder import DaliDecoder, Unavailable
from .pillow_decoder import PillowDecoder

AUTO = ("dali-gpu", "pillow")  # and, by its name alone, dali-cpu


class Decoder(Protocol):
    """Decodes in this process, whatever a file holds; `pool.py` does it where nothing can harm."""

    name: str

    @property
    def lack(self) -> str: ...

    by_pillow: int  # images so far, in place of this decoder

    @property
    def enlarged(self) -> int: ...

    def decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]: ...


def open_decoder(framing: Framing, names: Sequence[str], threads: int) -> tuple[Decoder, list[str]]:
    """The first of `names` that works on this machine, and what the ones before it, or it, lack.

    Raises `RunError` where none does.
    """
    faults: list[str] = []
    for name in names:
        try:
            decoder: Decoder
            if name == "pillow":
                decoder = PillowDecoder(framing)
            else:
                decoder = DaliDecoder(framing, name.removeprefix("dali-"), threads)
            return decoder, [*faults, decoder.lack] if decoder.lack else faults
        except Unavailable as fault:
            faults.append(str(fault))
    raise RunError("; ".join(faults))
