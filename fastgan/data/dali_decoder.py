"""NVIDIA DALI, on the GPU, or on a CPU if asked for; there kornia-rs takes plain PNGs. What neither
does or can is Pillow's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..framing import Box, Framing
from .pillow_decoder import PillowDecoder
from .routes import Route, jpeg_route, png_route

GROUP_PIXELS = 32_000_000  # decoded at once: 96 MB of RGB
RETRY_WIDTH = 8  # a group that failed is tried again in pieces of this many, then one by one


class _Groups:
    """Places of files, in groups that may be decoded at once."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self._room = 0

    def add(self, at: int, pixels: int) -> None:
        if not self.groups or pixels > self._room:
            self.groups.append([])
            self._room = GROUP_PIXELS
        self.groups[-1].append(at)
        self._room -= pixels


class Unavailable(Exception):
    """A decoder that does not work here, with the reason."""


class DaliDecoder:
    """Image files to squares, a group at a time, by DALI's dynamic mode.

    Args:
        device: "gpu" or "cpu". On the GPU JPEGs are decoded there; PNGs are inflated on the CPU (by
            DALI 2.4) and resized on the GPU. On the CPU plain PNGs are decoded by kornia-rs, in 6
            ms where DALI takes 20 (1024 px), and resized by DALI.
        threads: on the CPU.

    Raises:
        Unavailable: it cannot be imported, or fails on a known JPEG.
    """

    def __init__(self, framing: Framing, device: str, threads: int) -> None:
        self.name = f"dali-{device}"
        self.framing = framing
        self._device = device
        self._pillow = PillowDecoder(framing)
        self._enlarged = 0
        self.by_pillow = 0  # that Pillow decoded in place of DALI
        try:
            import nvidia.dali.experimental.dynamic as ndd
            from nvidia import nvimgcodec  # type: ignore[attr-defined]  # untyped namespace package
            from nvidia.dali import types as dali_types
        except Exception as error:  # a damaged install raises more than ImportError
            raise Unavailable(f"no {self.name}: DALI cannot be imported ({error})") from error
        types: Any = dali_types  # its names are made when it is imported
        self._ndd, self._types, self._codec = ndd, types, nvimgcodec
        self._filter = {
            "triangular": types.INTERP_TRIANGULAR,
            "lanczos": types.INTERP_LANCZOS3,
            "cubic": types.INTERP_CUBIC,
        }[framing.filter]
        ndd.set_num_threads(threads)
        self._probe()

    @property
    def lack(self) -> str:
        """What makes it slower than it could be, or ""."""
        return self._pillow.lack if self._device == "cpu" else ""

    @property
    def enlarged(self) -> int:
        """Images whose part was smaller than the square."""
        return self._enlarged + self._pillow.enlarged

    def decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        """As `PillowDecoder.decode`. One bad file changes nothing in the others.

        Raises:
            Unavailable: DALI does not work any more.
        """
        results: list[np.ndarray | str] = ["" for _ in blobs]
        by_dali, by_kornia, others = _Groups(), _Groups(), []
        for at, blob in enumerate(blobs):
            pixels, route = self._header(blob)
            if isinstance(pixels, str):
                results[at] = pixels
            elif route == "odd":
                others.append(at)
            elif route == "rgb8" and self._device == "cpu" and not self.lack:
                by_kornia.add(at, pixels)
            else:
                by_dali.add(at, pixels)
        for group in by_kornia.groups:
            others += self._frame_pngs(group, blobs, results)
        for group in by_dali.groups:
            refused = self._decode_group(group, blobs, results)
            if len(refused) == len(group) > 1:
                self._probe()  # is it the files, or has DALI stopped working?
            others += refused
        for at in others:
            results[at] = self._pillow.decode_one(blobs[at])
            self.by_pillow += not isinstance(results[at], str)
        return results

    def _probe(self) -> None:
        """A small JPEG first: a broken decoder is passed over here and not in every batch."""
        file = io.BytesIO()
        Image.new("RGB", (96, 64), (200, 60, 30)).save(file, "JPEG")
        plain = Framing(self.framing.size, filter=self.framing.filter)
        expected = PillowDecoder(plain).decode_one(file.getvalue())
        framing, enlarged = self.framing, self._enlarged
        try:
            self.framing = plain
            (got,) = self._batch([file.getvalue()])
        except Exception as error:  # whatever a driver, a library or a version may raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = lines[-1] if lines else type(error).__name__
            raise Unavailable(f"no {self.name}: it fails on a known JPEG ({what})") from error
        finally:
            self.framing, self._enlarged = framing, enlarged
        if np.abs(np.asarray(got, int) - np.asarray(expected, int)).max() > 3:
            raise Unavailable(f"no {self.name}: it decodes a known JPEG to wrong colours")

    def _header(self, blob: bytes) -> tuple[int | str, Route]:
        """The pixels of a file, or why it is refused; and what may decode it (`routes.py`)."""
        try:
            stream = self._codec.CodeStream(blob)
            width, height, codec = stream.width, stream.height, stream.codec_name
        except RuntimeError:
            return 0, "odd"
        pixels = self.framing.too_large(width, height) or int(width * height)
        if codec == "png":
            return pixels, png_route(blob)
        return pixels, jpeg_route(blob) if codec == "jpeg" else "odd"

    def _frame_pngs(
        self, group: list[int], blobs: Sequence[bytes], results: list[np.ndarray | str]
    ) -> list[int]:
        """Fill in the results of plain PNGs; returns those that kornia-rs refuses."""
        pictures = {at: self._pillow.png.decode(blobs[at]) for at in group}
        sound = {at: picture for at, picture in pictures.items() if picture is not None}
        if sound:
            squares = self._frame(self._ndd.as_batch(list(sound.values())))
            for at, square in zip(sound, squares, strict=True):
                results[at] = square
        return [at for at in group if at not in sound]

    def _decode_group(
        self, group: list[int], blobs: Sequence[bytes], results: list[np.ndarray | str]
    ) -> list[int]:
        """Fill in the results of a group; returns the members that DALI refuses even alone."""
        try:
            squares = self._batch([blobs[at] for at in group])
        except (RuntimeError, MemoryError):  # of the whole batch, mostly without naming the file
            if len(group) == 1:
                return group
            width = RETRY_WIDTH if len(group) > RETRY_WIDTH else 1
            pieces = [group[at : at + width] for at in range(0, len(group), width)]
            return [at for piece in pieces for at in self._decode_group(piece, blobs, results)]
        for at, square in zip(group, squares, strict=True):
            results[at] = square
        return []

    def _batch(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        """Squares, or why an image is refused for its sides; RuntimeError or MemoryError where a
        file cannot be decoded.
        """
        images = self._ndd.decoders.image(
            self._ndd.as_batch([np.frombuffer(blob, np.uint8) for blob in blobs]),
            device=self._device,
            output_type=self._types.RGB,  # ANY_DATA corrupts the heap on gray JPEGs
            jpeg_fancy_upsampling=True,  # as the CPU does; the GPU's default is coarser
        )
        return self._frame(images)

    def _frame(self, images: Any) -> list[np.ndarray | str]:
        """A batch of pictures of any sides, framed."""
        ndd, size = self._ndd, self.framing.size
        sides = [shape[:2] for shape in images.shape]
        boxes = [self.framing.box(width, height) for height, width in sides]
        parts = [Box(0, 0, 1, 1) if isinstance(box, str) else box for box in boxes]
        if any((part.height, part.width) != side for part, side in zip(parts, sides, strict=True)):
            images = ndd.slice(
                images,
                ndd.as_batch(np.array([(part.top, part.left) for part in parts], np.int32)),
                ndd.as_batch(np.array([(part.height, part.width) for part in parts], np.int32)),
                axes=(0, 1),
            )
        images = ndd.resize(images, size=(size, size), interp_type=self._filter)
        squares = np.array(ndd.as_tensor(images).cpu())  # a copy: DALI may use its buffer again
        kept = [box for box in boxes if not isinstance(box, str)]
        self._enlarged += sum(min(box.width, box.height) < size for box in kept)
        return [
            box if isinstance(box, str) else square
            for box, square in zip(boxes, squares, strict=True)
        ]
