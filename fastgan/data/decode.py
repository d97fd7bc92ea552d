"""Image files, as bytes, to uint8 RGB squares.

Framing, the same in every decoder: EXIF orientation applied, the largest centred square cut out
(offset floor((side - square) / 2)), then an antialiased triangular resize. Alpha is dropped without
blending, 16-bit samples become round(x / 257). DALI and Pillow agree bit for bit on JPEG and PNG
pixels; after the resize they are within one level of each other, except in the outermost rows and
columns (two where the picture hardly shrinks): there DALI repeats the border pixel where Pillow
cuts the kernel off.

DALI decodes JPEG and PNG, on the GPU where there is one. Pillow takes every other format (DALI does
not scale a PGM by its maximum, for one) and what DALI refuses. A file that Pillow refuses too is
answered with the reason.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..env import cores
from ..errors import RunError
from .quiet import quiet

CROP = "center"
FILTER = "triangular"
MAX_PIXELS = 64_000_000  # an 8 KB JPEG can claim 400 million and cost seconds and gigabytes
GROUP_PIXELS = 2 * MAX_PIXELS  # decoded at once by DALI: 384 MB of RGB
NO_GPU = "no dali-gpu: torch sees no NVIDIA GPU"
RETRY_WIDTH = 8  # a batch that failed is tried again in pieces of this many, then one by one

DALI_CODECS = ("jpeg", "png")  # compared with Pillow pixel for pixel
# Pillow would also try formats that run other programs (EPS starts Ghostscript).
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000")
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WEBP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# else its notes on odd TIFFs go to stderr
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Decoder:
    """Turns image files into squares of `size` pixels; see `open_decoder`."""

    def __init__(self, size: int, name: str, why: str) -> None:
        self.size = size
        self.name = name
        self.why = why  # why no better decoder is used; empty for the best
        self.by_pillow = 0  # images that Pillow decoded in place of the decoder named

    def decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        """One uint8 [size, size, 3] array for each file, or the reason why it was refused.

        A reason is one line; what stands before its first colon is the kind, by which reasons can
        be counted. One bad file changes nothing in the others. May be called from several threads,
        which then take turns.
        """
        with quiet():
            return self._decode(blobs)

    def _decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        raise NotImplementedError


class Unavailable(Exception):
    """A decoder that does not work here, with the reason."""


def open_decoder(size: int, prefer: str = "auto") -> Decoder:
    """The best decoder that works on this machine, or the one of that name: dali-gpu, dali-cpu,
    pillow.

    Each candidate decodes a small JPEG first, so that a broken one is passed over here and not in
    every batch. Raises `RunError` where the decoder asked for by name does not work.
    """
    if prefer not in ("auto", *DECODERS):
        names = ", ".join(DECODERS)
        raise ValueError(f"open_decoder: prefer must be auto, {names}; got {prefer!r}")
    if size < 1:
        raise ValueError(f"open_decoder: size must be 1 or more, got {size}")
    faults: list[str] = []
    for name in DECODERS if prefer == "auto" else (prefer,):
        try:
            return DECODERS[name](size, name, "; ".join(faults))
        except Unavailable as fault:
            faults.append(str(fault))
    raise RunError(faults[0])


class PillowDecoder(Decoder):
    """Pillow in threads; it leaves Python's lock while it decodes and resizes."""

    def __init__(self, size: int, name: str = "pillow", why: str = "") -> None:
        super().__init__(size, name, why)
        Image.init()  # here, because the plugins are not to be imported by several threads at once
        self._formats = tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)
        self._threads = ThreadPoolExecutor(cores(), thread_name_prefix="pillow")

    def _decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        if len(blobs) == 1:
            return [self._one(blobs[0])]
        return list(self._threads.map(self._one, blobs))

    def _one(self, blob: bytes) -> np.ndarray | str:
        kind = next((kind for magic, kind in MAGIC.items() if blob.startswith(magic)), "")
        try:
            with Image.open(io.BytesIO(blob), formats=self._formats) as image:
                kind = image.format or kind
                return too_large(*image.size) or self._square(image)
        except UnidentifiedImageError:
            if not blob:
                return "empty file"
            return f"damaged {kind}: its header cannot be read" if kind else "not an image"
        except Image.DecompressionBombError as error:  # raised before the sides are known
            pixels = re.search(r"\d+", str(error))
            return f"too large: {int(pixels[0]) if pixels else 0:,} pixels, over {MAX_PIXELS:,}"
        except Exception as error:
            # the plugins let anything through, SyntaxError and struct.error too
            text = " ".join(str(error).split())[:120] or type(error).__name__
            return f"{'truncated' if 'truncated' in text else 'damaged'} {kind or 'file'}: {text}"

    def _square(self, image: Image.Image) -> np.ndarray | str:
        image.load()
        orientation = _orientation(image)
        picture: Image.Image = image
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
            # convert() would clip at 255
            wide = np.asarray(image).astype(np.uint32)
            picture = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        elif image.mode not in PLAIN_MODES:
            return f"unsupported: {image.format} with pixels of mode {image.mode}"
        if orientation in TURNS:
            picture = picture.transpose(TURNS[orientation])
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        return np.asarray(picture.resize((self.size, self.size), Image.Resampling.BILINEAR))


class DaliDecoder(Decoder):
    """DALI's dynamic mode on the CPU or the GPU; Pillow for the rest."""

    def __init__(self, size: int, name: str, why: str) -> None:
        super().__init__(size, name, why)
        self._device = name.removeprefix("dali-")
        if self._device == "gpu":
            import torch

            if not torch.cuda.is_available():
                raise Unavailable(NO_GPU)
        try:
            import nvidia.dali.experimental.dynamic as ndd
            from nvidia import nvimgcodec  # type: ignore[attr-defined]  # untyped namespace package
            from nvidia.dali import types
        except Exception as error:  # a damaged install raises more than ImportError
            raise Unavailable(f"no {name}: DALI cannot be imported ({error})") from error
        self._ndd, self._types, self._codec = ndd, types, nvimgcodec
        self._pillow = PillowDecoder(size)
        ndd.set_num_threads(cores())
        self._probe()

    def _probe(self) -> None:
        file = io.BytesIO()
        Image.new("RGB", (24, 16), (200, 60, 30)).save(file, "JPEG")
        expected = self._pillow._one(file.getvalue())
        try:
            with quiet():
                got = self._batch([file.getvalue()])[0]
        except Exception as error:  # whatever a driver, a library or a version may raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = lines[-1] if lines else type(error).__name__
            raise Unavailable(f"no {self.name}: it fails on a known JPEG ({what})") from error
        if np.abs(got.astype(int) - np.asarray(expected, dtype=int)).max() > 3:
            raise Unavailable(f"no {self.name}: it decodes a known JPEG to wrong colours")

    def _decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        results: list[np.ndarray | str] = ["" for _ in blobs]
        groups: list[list[int]] = [[]]
        others: list[int] = []
        room = GROUP_PIXELS
        for at, blob in enumerate(blobs):
            pixels = self._header(blob)
            if isinstance(pixels, str):
                results[at] = pixels
            elif pixels == 0:
                others.append(at)
            else:
                if pixels > room and groups[-1]:
                    groups.append([])
                    room = GROUP_PIXELS
                groups[-1].append(at)
                room -= pixels
        for group in groups:
            others += self._decode_group(group, blobs, results)
        for at, result in zip(
            others, self._pillow._decode([blobs[at] for at in others]), strict=True
        ):
            results[at] = result
            self.by_pillow += not isinstance(result, str)
        return results

    def _header(self, blob: bytes) -> int | str:
        """The pixels of a file that DALI may decode, 0 if Pillow must, or why it is refused."""
        try:
            stream = self._codec.CodeStream(blob)
            width, height, codec = stream.width, stream.height, stream.codec_name
        except RuntimeError:
            return 0
        if width * height > MAX_PIXELS:
            return too_large(width, height)
        if codec not in DALI_CODECS or (codec == "png" and not png_chunks_fit(blob)):
            return 0
        return int(width * height)

    def _decode_group(
        self, group: list[int], blobs: Sequence[bytes], results: list[np.ndarray | str]
    ) -> list[int]:
        """Fill in the results of a group; returns the members that DALI refuses even alone."""
        if not group:
            return []
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

    def _batch(self, blobs: Sequence[bytes]) -> np.ndarray:
        """uint8 [N, size, size, 3]; RuntimeError or MemoryError where a file cannot be decoded."""
        ndd, types = self._ndd, self._types
        images = ndd.decoders.image(
            ndd.as_batch([np.frombuffer(blob, np.uint8) for blob in blobs]),
            device=self._device,
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as the CPU does; the GPU's default is coarser
        )
        sides = np.array([shape[:2] for shape in images.shape], np.int32)
        square = sides.min(axis=1, keepdims=True)
        starts, shapes = (sides - square) // 2, np.repeat(square, 2, axis=1)
        images = ndd.slice(
            images, ndd.as_batch(list(starts)), ndd.as_batch(list(shapes)), axes=(0, 1)
        )
        images = ndd.resize(
            images, size=(self.size, self.size), interp_type=types.INTERP_TRIANGULAR
        )
        # A copy, because DALI may use its buffer again. Through torch it costs 0.1 ms an image.
        return np.array(ndd.as_tensor(images).cpu())


DECODERS: dict[str, type[Decoder]] = {  # best first
    "dali-gpu": DaliDecoder,
    "dali-cpu": DaliDecoder,
    "pillow": PillowDecoder,
}


def too_large(width: int, height: int) -> str:
    """Why an image of this size is refused, or an empty string."""
    if width * height <= MAX_PIXELS:
        return ""
    return f"too large: {width}x{height} is over {MAX_PIXELS:,} pixels"


def png_chunks_fit(blob: bytes) -> bool:
    """Whether the chunks of a PNG lie inside the file and end with IEND.

    DALI's PNG decoder allocates what a chunk's length says before it reads: up to 5 GB for a file
    of 116 bytes.
    """
    at = 8
    while at + 12 <= len(blob):
        length = int.from_bytes(blob[at : at + 4], "big")
        if length > len(blob) - at - 12:
            return False
        if blob[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + length
    return False


def _orientation(image: Image.Image) -> int:
    """Of the EXIF block, like DALI, not of XMP. TIFFs have none here: Pillow has turned them."""
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION_TAG, 1))
    except Exception:
        # a damaged EXIF block, in as many ways as there are; the picture may be sound
        return 1
