"""Odd and broken image files, made from nothing, and for each what must come out of it."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

# Not square, with an odd rest beside the centred square; no blocks or bits fill up to 8.
HEIGHT, WIDTH = 37, 52

# Largest errors that libjpeg-turbo and libwebp make of the pictures below, plus one level.
JPEG_TOLERANCE = 5  # quality 100, 4:4:4: rounding only; one pixel aside is 13 levels or more
CMYK_TOLERANCE = 4  # the errors shrink where black is multiplied in
HALVED_TOLERANCE = 8  # 4:2:0, JPEG of quality 95 and WebP, of the smoothest pictures
SMOOTHEST = (2, 3)

TURNED = {  # by EXIF orientation: the upright picture of the stored one
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@dataclass(frozen=True, eq=False)  # arrays have no plain equality
class Odd:
    """One file and its truth."""

    name: str  # relative to the folder, with the suffix
    blob: bytes | None  # None where the file is a link
    pixels: np.ndarray | None  # upright uint8 [H, W, 3]; None where the file must be refused
    tolerance: int  # largest allowed difference of any pixel
    reason: str | tuple[str, ...]  # how the reason of a refusal may begin; "" where there is none
    link: str | None = None  # its target


def write_odd_files(folder: Path) -> list[Odd]:
    """Write all of `odd_files` into an existing folder."""
    files = odd_files()
    for odd in files:
        if odd.link is not None:
            (folder / odd.name).symlink_to(odd.link)
        else:
            (folder / odd.name).write_bytes(odd.blob)
    return files


def odd_files() -> list[Odd]:
    """Every file, the same bytes on each call."""
    return [
        *jpegs(),
        *jpegs_in_cmyk(),
        *pngs(),
        *pngs_with_chunks(),
        *netpbms(),
        *webps_and_bmps(),
        *tiffs(),
        *misnamed(),
        *named_oddly(),
        *not_images(),
        *truncated(),
        *too_large(),
        *damaged_jpegs(),
        *damaged_pngs(),
        *unsupported(),
        *broken_links(),
    ]


def sound(name: str, blob: bytes, samples: np.ndarray, tolerance: int = 0) -> Odd:
    """A file to be decoded, made of uint8 gray, gray + alpha, RGB or RGBA samples."""
    samples = np.atleast_3d(samples)
    if samples.shape[2] < 3:
        samples = samples[:, :, :1].repeat(3, axis=2)
    return Odd(name, blob, samples[:, :, :3], tolerance, "")


def refused(name: str, blob: bytes, *kinds: str) -> Odd:
    return Odd(name, blob, None, 0, kinds)


# Pictures: a different one for each name, so that no file can stand in for another


def random_of(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def blend(colours: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """float [*shape, C]: a grid of colours, linearly interpolated."""
    for axis, length in enumerate(shape):
        cells = colours.shape[axis]
        at = np.linspace(0, cells - 1, length)[:, None]
        weights = np.maximum(0, 1 - np.abs(at - np.arange(cells)))
        colours = np.moveaxis(np.tensordot(weights, colours, (1, axis)), 0, axis)
    return colours


def smooth(name, channels=3, shape=(HEIGHT, WIDTH), cells=(4, 6)):
    """uint8 [*shape, channels] that lossy coders hardly change."""
    colours = random_of(name).uniform(16, 240, (*cells, channels))
    return np.rint(blend(colours, shape)).astype(np.uint8)


def detailed(name: str, channels: int = 3) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, channels] with structure at every scale, in the alpha too."""
    return narrowed(wide_range(name, channels))


def wide_range(name: str, channels: int) -> np.ndarray:
    """uint16 [HEIGHT, WIDTH, channels], from 0 to 65535."""
    rng = random_of(name)
    picture = blend(rng.uniform(-40, 295, (5, 7, channels)), (HEIGHT, WIDTH))
    picture += rng.normal(0, 12, picture.shape)
    return np.clip(picture * 257, 0, 65535).astype(np.uint16)


def narrowed(samples: np.ndarray) -> np.ndarray:
    """16 bits to 8."""
    return np.rint(samples / 257).astype(np.uint8)


def indexed_picture(name):
    """A palette image and its uint8 [HEIGHT, WIDTH, 3]."""
    at = detailed(name, 1)[:, :, 0]
    colours = np.random.default_rng(8).integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(at)
    image.putpalette(colours.tobytes())
    return image, colours[at]


# Encoders


def encode(pixels, kind="PNG", **options):
    image = pixels
    if not isinstance(image, Image.Image):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(pixels, **options):
    return encode(pixels, "JPEG", **{"quality": 100, "subsampling": 0, **options})


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def rows_of(samples, depth):
    """uint8 [H, bytes of a row]: uint [H, W, C] packed as PNG and Netpbm do."""
    if depth == 16:
        samples = samples.astype(">u2").view(np.uint8)
    elif depth < 8:
        bits = np.unpackbits(samples.reshape(*samples.shape[:2], 1), axis=2)
        samples = np.packbits(bits[:, :, -depth:].reshape(len(samples), -1), axis=1)
    return samples.reshape(len(samples), -1)


def scanlines(rows):
    """The rows, each with filter 0."""
    return np.pad(rows, ((0, 0), (1, 0))).tobytes()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width, height, depth, colour, *chunks, interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png(samples, *chunks, depth=8, colour=None):
    """A PNG of uint [H, W, C] samples, with chunks before its IDAT."""
    height, width, channels = samples.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if colour is None else colour
    data = chunk(b"IDAT", zlib.compress(scanlines(rows_of(samples, depth))))
    return png_of(width, height, depth, colour, *chunks, data)


def endless(blob, kind):
    """With the length of its first chunk of a kind damaged to 2 GB."""
    at = blob.index(kind)
    return blob[: at - 4] + b"\x7f\xff\xff\xf0" + blob[at:]


def adam7(pixels):
    """An interlaced PNG of uint8 [H, W, C]."""
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    passes = [pixels[y::down, x::right] for y, x, down, right in (*starts, (1, 0, 2, 1))]
    data = b"".join(scanlines(rows_of(part, 8)) for part in passes)
    height, width, _ = pixels.shape
    return png_of(width, height, 8, 2, chunk(b"IDAT", zlib.compress(data)), interlace=1)


def swapped_profile():
    """An sRGB profile with red and blue exchanged: who applies it shows it."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # the date
    return profile.replace(b"rXYZ", b"swap").replace(b"bXYZ", b"rXYZ").replace(b"swap", b"bXYZ")


# Files to be decoded


def jpegs():
    variants = {
        "444": {},
        "progressive": {"progressive": True},
        "optimized": {"optimize": True},
        "restart": {"restart_marker_blocks": 3},
        "comment": {"comment": b"\xff\xd8 no marker \xff\xd9"},
        "icc": {"icc_profile": swapped_profile()},
        "damaged-exif": {"exif": b"Exif\0\0garbage"},
        "short-exif": {"exif": exif(6)[:-9]},
    }
    for kind, options in variants.items():
        pixels = smooth(kind)
        yield sound(f"{kind}.jpg", jpeg(pixels, **options), pixels, JPEG_TOLERANCE)
    for kind, options in {"420": {}, "420-progressive": {"progressive": True}}.items():
        pixels = smooth(kind, cells=SMOOTHEST)
        blob = jpeg(pixels, quality=95, subsampling=2, **options)
        yield sound(f"{kind}.jpg", blob, pixels, HALVED_TOLERANCE)
    for orientation, turn in TURNED.items():
        stored = smooth(f"orientation {orientation}")
        blob = jpeg(stored, exif=exif(orientation))
        yield sound(f"orientation-{orientation}.jpg", blob, turn(stored), JPEG_TOLERANCE)
    gray = smooth("gray jpeg", 1)
    yield sound("gray.jpg", jpeg(gray), gray, JPEG_TOLERANCE)
    pixels = smooth("after the end")
    yield sound("trailing.jpg", jpeg(pixels) + b"\xff\xd8\xff" * 99, pixels, JPEG_TOLERANCE)
    for height, width in ((1, 1), (3, 400), (400, 3)):
        pixels = smooth(f"{width}x{height}", shape=(height, width))
        yield sound(f"{width}x{height}.jpg", jpeg(pixels), pixels, JPEG_TOLERANCE)


def jpegs_in_cmyk():
    """Both with Adobe's marker and inverted samples, as Photoshop and Pillow write them."""
    for kind in ("cmyk", "ycck"):
        inks = smooth(kind, 4)
        bright = 255 - inks.astype(int)
        pixels = np.rint(bright[:, :, :3] * bright[:, :, 3:] / 255).astype(np.uint8)
        if kind == "ycck":
            luma_chroma = Image.fromarray(inks[:, :, :3]).convert("YCbCr")
            inks = np.dstack([255 - np.asarray(luma_chroma), inks[:, :, 3]])
        blob = jpeg(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()))
        if kind == "ycck":
            at = blob.index(b"Adobe") + 11
            assert blob[at] == 0
            blob = blob[:at] + b"\2" + blob[at + 1 :]
        yield sound(f"{kind}.jpg", blob, pixels, CMYK_TOLERANCE)


def pngs():
    for kind, channels in {"gray": 1, "gray-alpha": 2, "rgb": 3, "rgba": 4}.items():
        samples = detailed(f"{kind} png", channels)
        if channels in (2, 4):
            samples[:12, :20, -1] = samples[-12:, -20:, -1] = 0  # hidden colours
        yield sound(f"{kind}-8.png", png(samples), samples)
        wide = wide_range(f"{kind} wide png", channels)
        # Pillow keeps the high byte of all but plain gray, which is one below at times.
        yield sound(f"{kind}-16.png", png(wide, depth=16), narrowed(wide), int(channels > 1))
    for depth in (1, 2, 4):
        gray = detailed(f"gray {depth}", 1) >> (8 - depth)
        yield sound(f"gray-{depth}.png", png(gray, depth=depth), gray * (255 // (2**depth - 1)))
    for depth in (1, 2, 4, 8):
        at = detailed(f"palette {depth}", 1) >> (8 - depth)
        colours = np.random.default_rng(depth).integers(0, 256, (2**depth, 3), np.uint8)
        palette, see_through = chunk(b"PLTE", colours.tobytes()), chunk(b"tRNS", b"\0\x80")
        pixels = colours[at[:, :, 0]]
        blob = png(at, palette, depth=depth, colour=3)
        yield sound(f"palette-{depth}.png", blob, pixels)
        blob = png(at, palette, see_through, depth=depth, colour=3)
        yield sound(f"palette-{depth}-transparent.png", blob, pixels)


def pngs_with_chunks():
    pixels = detailed("interlaced")
    yield sound("interlaced.png", adam7(pixels), pixels)
    pixels = detailed("colour key")
    key = chunk(b"tRNS", pixels[0, 0].astype(">u2").tobytes())
    yield sound("colour-key.png", png(pixels, key), pixels)
    pixels = detailed("turned")
    blob = png(pixels, chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0")))
    yield sound("orientation-6.png", blob, TURNED[6](pixels))
    pixels = detailed("texts")
    texts = chunk(b"tEXt", b"Comment\0IEND"), chunk(b"zTXt", b"Title\0\0" + zlib.compress(b"IDAT"))
    yield sound("texts.png", png(pixels, *texts), pixels)
    pixels = detailed("colours of its own")
    profile = chunk(b"iCCP", b"swapped\0\0" + zlib.compress(swapped_profile()))
    yield sound("icc.png", png(pixels, profile), pixels)
    pixels = detailed("gamma")
    yield sound("gamma.png", png(pixels, chunk(b"gAMA", struct.pack(">I", 100_000))), pixels)
    pixels = detailed("still")
    frames = [Image.fromarray(detailed(f"moving {i}")) for i in range(2)]
    blob = encode(pixels, save_all=True, default_image=True, append_images=frames)
    yield sound("animated.png", blob, pixels)
    pixels = detailed("cut")
    yield sound("without-last-2-bytes.png", png(pixels)[:-2], pixels)  # of IEND's checksum
    pixels = detailed("after the end")
    yield sound("trailing.png", png(pixels) + b"IDAT" * 99, pixels)
    pixels = detailed("checksum")
    blob = bytearray(png(pixels))
    blob[-13] ^= 1  # of IDAT's checksum; by zlib's, inside, the pixels are whole
    yield sound("wrong-checksum.png", bytes(blob), pixels)
    pixels = detailed("length")
    yield sound("endless-idat.png", endless(png(pixels), b"IDAT"), pixels)  # as whole as that


def netpbms():
    size = b"%d %d\n" % (WIDTH, HEIGHT)
    gray = detailed("P5", 1)
    yield sound("gray.pgm", b"P5\n# a comment\n" + size + b"255\n" + gray.tobytes(), gray)
    low = detailed("P5 to 63", 1) // 4
    scaled = np.rint(low * (255 / 63)).astype(np.uint8)
    yield sound("gray-63.pgm", b"P5\n" + size + b"63\n" + low.tobytes(), scaled, 1)
    gray = detailed("P2", 1)
    digits = b"\n".join(b"%d" % value for value in gray.flat)
    yield sound("plain.pgm", b"P2\n" + size + b"255\n" + digits, gray)
    pixels = detailed("P6")
    yield sound("rgb.ppm", b"P6\n" + size + b"255\n" + pixels.tobytes(), pixels)
    for name, magic, channels in (("gray-16.pgm", b"P5\n", 1), ("rgb-16.ppm", b"P6\n", 3)):
        wide = wide_range(name, channels)
        blob = magic + size + b"65535\n" + rows_of(wide, 16).tobytes()
        yield sound(name, blob, narrowed(wide), int(channels > 1))
    ink = detailed("P4", 1) >> 7
    yield sound("bits.pnm", b"P4\n" + size + rows_of(ink, 1).tobytes(), (1 - ink) * 255)


def webps_and_bmps():
    pixels = detailed("webp")
    yield sound("lossless.webp", encode(pixels, "WEBP", lossless=True), pixels)
    pixels = smooth("lossy webp", cells=SMOOTHEST)
    yield sound("lossy.webp", encode(pixels, "WEBP", quality=95), pixels, HALVED_TOLERANCE)
    pixels = detailed("webp with alpha", 4)
    pixels[:12, :20, 3] = 0
    yield sound("alpha.webp", encode(pixels, "WEBP", lossless=True, exact=True), pixels)
    pixels = detailed("first of webp")
    later = [Image.fromarray(detailed("second of webp"))]
    blob = encode(pixels, "WEBP", lossless=True, save_all=True, append_images=later)
    yield sound("animated.webp", blob, pixels)
    stored = detailed("turned webp")
    blob = encode(stored, "WEBP", lossless=True, exif=exif(6))
    yield sound("orientation-6.webp", blob, TURNED[6](stored))
    for depth, channels in ((24, 3), (32, 4)):
        pixels = detailed(f"bmp {depth}", channels)
        yield sound(f"rgb-{depth}.bmp", encode(pixels, "BMP"), pixels)
    indexed, pixels = indexed_picture("bmp 8")
    yield sound("palette-8.bmp", encode(indexed, "BMP"), pixels)


def tiffs():
    codecs = {"uncompressed": None, "lzw": "tiff_lzw", "deflate": "tiff_adobe_deflate"}
    for kind, compression in codecs.items():
        pixels = detailed(f"{kind} tiff")
        yield sound(f"{kind}.tif", encode(pixels, "TIFF", compression=compression), pixels)
    wide = wide_range("gray tiff", 1)
    yield sound("gray-16.tif", encode(wide, "TIFF"), narrowed(wide))
    stored = detailed("turned tiff")
    blob = encode(stored, "TIFF", tiffinfo={0x0112: 6})
    yield sound("orientation-6.tiff", blob, TURNED[6](stored))
    pixels = detailed("first page")
    later = [Image.fromarray(detailed("second page"))]
    blob = encode(pixels, "TIFF", save_all=True, append_images=later)
    yield sound("pages.tiff", blob, pixels)


def misnamed():
    pixels = detailed("a png")
    yield sound("png.jpg", png(pixels), pixels)
    pixels = smooth("a jpeg")
    yield sound("jpeg.png", jpeg(pixels), pixels, JPEG_TOLERANCE)
    pixels = detailed("a webp")
    yield sound("webp.jpeg", encode(pixels, "WEBP", lossless=True), pixels)
    pixels = detailed("a jpeg 2000")
    yield sound("jpeg-2000.jpg", encode(pixels, "JPEG2000"), pixels)
    indexed, pixels = indexed_picture("a gif")
    later = [indexed_picture("second of gif")[0]]
    yield sound("gif.png", encode(indexed, "GIF", save_all=True, append_images=later), pixels)


def named_oddly():
    # Different letters in the two normal forms: some file systems take them for one name.
    names = (
        ' two  spaces, "quotes" and it\'s.png',
        "smile \N{GRINNING FACE}.png",
        "two\nlines.png",
        "composed \u00e9.png",
        "decomposed o\u0308.png",
        "LOUD.PNG",
        "x" * 236 + ".png",  # 240 of the 255 bytes that file systems allow
    )
    for name in names:
        pixels = detailed(name)
        yield sound(name, png(pixels), pixels)
    pixels = smooth("loud jpeg")
    yield sound("LOUD.JPG", jpeg(pixels), pixels, JPEG_TOLERANCE)


# Files to be refused


def not_images():
    gzip = zlib.compressobj(wbits=31)
    noise = np.random.default_rng(0).bytes(4000)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    yield refused("empty.jpg", b"", "empty file")
    yield refused("text.jpg", b"Not a picture, but text.\n" * 40, "not an image")
    yield refused("page.png", b"<!DOCTYPE html><title>404</title>", "not an image")
    yield refused("gzip.tif", gzip.compress(noise) + gzip.flush(), "not an image")
    yield refused("drawing.png", svg, "not an image")
    yield refused("noise.bmp", noise, "not an image")
    yield refused("icon.png", encode(detailed("icon"), "ICO", sizes=[(32, 32)]), "not an image")


def truncated():
    pixels = detailed("cut short")
    whole = {
        "jpg": jpeg(pixels),
        "png": png(pixels),
        "webp": encode(pixels, "WEBP", lossless=True),
        "bmp": encode(pixels, "BMP"),
        "tif": encode(pixels, "TIFF"),
        "ppm": encode(pixels, "PPM"),
    }
    for suffix, blob in whole.items():
        for percent in (1, 50, 99):
            cut = blob[: len(blob) * percent // 100]
            yield refused(f"first-{percent}-percent.{suffix}", cut, "truncated", "damaged")
    headers = whole["jpg"].index(b"\xff\xda")  # start of scan
    yield refused("only-headers.jpg", whole["jpg"][:headers], "truncated JPEG", "damaged JPEG")


def frame_header(blob):
    """Where a baseline JPEG's starts: marker, length, precision, height, width."""
    return blob.index(b"\xff\xc0\0\x11\x08")


def jpeg_that_claims(height, width):
    blob = jpeg(smooth("claims"))
    at = frame_header(blob) + 5
    return blob[:at] + struct.pack(">HH", height, width) + blob[at + 4 :]


def too_large():
    yield refused("65535x65535.jpg", jpeg_that_claims(65535, 65535), "too large")
    yield refused("20000x20000.jpg", jpeg_that_claims(20_000, 20_000), "too large")
    few = chunk(b"IDAT", zlib.compress(bytes(99)))
    yield refused("65535x65535.png", png_of(65535, 65535, 8, 2, few), "too large")
    side, packer = 20_000, zlib.compressobj(9)
    thousand_rows = bytes(1000 * (1 + side // 8))  # of one bit a pixel: 49 KB become 1.2 GB of RGB
    data = b"".join(packer.compress(thousand_rows) for _ in range(side // 1000)) + packer.flush()
    yield refused("bomb.png", png_of(side, side, 1, 0, chunk(b"IDAT", data)), "too large")


def damaged_jpegs():
    blob = jpeg(smooth("12 bits"))
    at = frame_header(blob)
    extended = blob[:at] + b"\xff\xc1\0\x11\x0c" + blob[at + 5 :]
    yield refused("12-bit.jpg", extended, "unsupported", "damaged JPEG")
    header = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
    yield refused("zeros-after-header.jpg", header + bytes(400), "damaged JPEG", "truncated JPEG")


def damaged_pngs():
    kinds = ("damaged PNG", "truncated PNG")
    pixels = detailed("damaged png")
    whole = png(pixels)
    text = chunk(b"tEXt", b"Comment\0hides the pixels")
    yield refused("endless-text.png", endless(png(pixels, text), b"tEXt"), *kinds)
    yield refused("endless-and-cut.png", endless(whole, b"IDAT")[:-900], *kinds)
    middle = len(whole) // 2
    yield refused("hole.png", whole[:middle] + bytes(50) + whole[middle + 50 :], *kinds)
    data = zlib.compress(scanlines(rows_of(pixels, 8)))
    middle = len(data) // 2
    data = chunk(b"IDAT", data[:middle] + bytes(50) + data[middle + 50 :])
    yield refused("hole-right-checksum.png", png_of(WIDTH, HEIGHT, 8, 2, data), *kinds)
    yield refused("no-pixels.png", png_of(WIDTH, HEIGHT, 8, 2), *kinds)
    data = chunk(b"IDAT", zlib.compress(bytes(HEIGHT)))
    yield refused("no-width.png", png_of(0, HEIGHT, 8, 2, data), *kinds)


def unsupported():
    fraction = detailed("float", 1) / np.float32(255)
    yield refused("float.tif", encode(fraction, "TIFF"), "unsupported")
    # A camera's raw file: one colour a pixel, photometric interpretation 32803.
    blob = encode(wide_range("raw", 1), "TIFF")
    black_is_zero = struct.pack("<HHIH", 262, 3, 1, 1)
    assert blob.count(black_is_zero) == 1
    blob = blob.replace(black_is_zero, struct.pack("<HHIH", 262, 3, 1, 32803))
    yield refused("raw.tif", blob, "unsupported", "damaged TIFF")


def broken_links():
    yield Odd("dangling.jpg", None, None, 0, "unreadable", link="nowhere.jpg")
    yield Odd("itself.png", None, None, 0, "unreadable", link="itself.png")
