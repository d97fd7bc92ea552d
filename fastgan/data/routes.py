"""Which decoders may be given a file, from a look at its structure: some are not safe with all."""

from __future__ import annotations

from typing import Literal

PNG = b"\x89PNG\r\n\x1a\n"
RGB8 = b"\x08\x02"  # a PNG's depth and colour type, as the header has them
EXIF = b"Exif\0\0"
SCAN, APP1 = 0xDA, 0xE1

Route = Literal["rgb8", "other", "odd"]  # any and kornia-rs; any; only one that is careful


def png_route(blob: bytes) -> Route:
    """What may decode a PNG, from its chunks: any decoder and this one (rgb8), any other, or only
    one that is careful (odd).

    rgb8 is 8-bit RGB without transparency and orientation. Odd are animations, of which DALI gives
    the first frame, which need not be the picture; and what does not end with IEND inside the file:
    DALI allocates what a chunk's length says before it reads, up to 5 GB for a file of 116 bytes.
    """
    plain = blob[24:26] == RGB8
    at = len(PNG)
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


def jpeg_route(blob: bytes) -> Route:
    """What may decode a JPEG. Odd is one whose EXIF directory has more entries than its segment has
    room for: DALI reads them all the same, and damages its heap.
    """
    at = 2
    while at + 4 <= len(blob) and blob[at] == 0xFF:
        marker, length = blob[at + 1], int.from_bytes(blob[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == SCAN:
            break
        if marker == APP1 and not _exif_fits(blob[at + 4 : at + 2 + length]):
            return "odd"
        at += 2 + length
    return "other"


def _exif_fits(segment: bytes) -> bool:
    """Whether the first directory of an EXIF segment lies inside it; True for any other segment."""
    if not segment.startswith(EXIF):
        return True
    tiff = segment[len(EXIF) :]
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])
    if order is None:
        return False
    start = int.from_bytes(tiff[4:8], order)  # type: ignore[arg-type]
    entries = int.from_bytes(tiff[start : start + 2], order)  # type: ignore[arg-type]
    return start + 2 + 12 * entries <= len(tiff)
