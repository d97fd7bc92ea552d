"""Pillow, with kornia-rs for plain PNGs: what decodes on a CPU, and what DALI refuses."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..framing import Framing
from .png_decoder import PngDecoder, png_sides
from .routes import PNG, png_route

# Pillow would also try formats that run other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000")
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
FILTERS = {
    "triangular": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "cubic": Image.Resampling.BICUBIC,
}
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


class PillowDecoder:
    """Image files to squares, one after the other."""

    name = "pillow"

    def __init__(self, framing: Framing) -> None:
        self.framing = framing
        self.by_pillow = 0  # in place of another decoder
        self.enlarged = 0  # whose part was smaller than the square
        self.png = PngDecoder()
        Image.init()
        Image.MAX_IMAGE_PIXELS = None  # the limit here is the framing's
        self._formats = tuple(name for name in FORMATS if name in Image.OPEN)

    @property
    def lack(self) -> str:
        """What makes it slower than it could be, or ""."""
        return self.png.lack

    def decode(self, blobs: Sequence[bytes]) -> list[np.ndarray | str]:
        """One uint8 [size, size, 3] array for each file, or the reason why it was refused: one
        line, its kind before the first colon.
        """
        return [self._decode(blob) for blob in blobs]

    def _decode(self, blob: bytes) -> np.ndarray | str:
        if not self.png.lack and blob.startswith(PNG) and png_route(blob) == "rgb8":
            reason = self.framing.too_large(*png_sides(blob))
            picture = None if reason else self.png.decode(blob)
            if picture is not None:
                return self._frame(Image.fromarray(picture))
        return self.decode_one(blob)

    def decode_one(self, blob: bytes) -> np.ndarray | str:
        """By Pillow alone, however plain the file is."""
        kind = next((kind for magic, kind in MAGIC.items() if blob.startswith(magic)), "")
        try:
            with Image.open(io.BytesIO(blob), formats=self._formats) as image:
                kind = image.format or kind
                return self.framing.too_large(*image.size) or self._square(image)
        except UnidentifiedImageError:
            if not blob:
                return "empty file"
            return f"damaged {kind}: its header cannot be read" if kind else "not an image"
        except MemoryError:
            return "too large: its decoder asks for more memory than it may have"
        except Exception as error:
            # the plugins let anything through, SyntaxError and struct.error too
            text = " ".join(str(error).split())[:120] or type(error).__name__
            fault = "truncated" if "truncated" in text.lower() else "damaged"
            return f"{fault} {kind or 'file'}: {text}"

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
        return self._frame(picture)

    def _frame(self, picture: Image.Image) -> np.ndarray | str:
        """An upright picture, framed."""
        box, size = self.framing.box(*picture.size), self.framing.size
        if isinstance(box, str):
            return box
        self.enlarged += min(box.width, box.height) < size
        if (box.width, box.height) != picture.size:
            left, top, width, height = box
            picture = picture.crop((left, top, left + width, top + height))
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        return np.asarray(picture.resize((size, size), FILTERS[self.framing.filter]))


def _orientation(image: Image.Image) -> int:
    """Of the EXIF block, like DALI, not of XMP. TIFFs have none here: Pillow has turned them."""
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return int(exif.get(ORIENTATION_TAG, 1))
    except Exception:
        # a damaged EXIF block, in as many ways as there are; the picture may be sound
        return 1
