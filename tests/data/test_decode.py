"""Decoders against known pixels and against each other; damaged files by their kind and alone."""

import io
import struct
import sys
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from odd_files import odd_files
from PIL import Image

from fastgan.data import dali_decoder
from fastgan.data.dali_decoder import DaliDecoder
from fastgan.data.decode import open_decoder
from fastgan.data.png_decoder import PngDecoder
from fastgan.data.routes import jpeg_route, png_route
from fastgan.errors import RunError
from fastgan.framing import Crop, Framing

HAS_DALI = bool(find_spec("nvidia") and find_spec("nvidia.dali"))
HERE = ["pillow"] + (["dali-cpu"] if HAS_DALI else [])
ALL = ["dali-gpu", "dali-cpu", "pillow"]
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
both = pytest.mark.parametrize("name", ["pillow", pytest.param("dali-cpu", marks=needs_dali)])


def encode(pixels, kind="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(height, width, seed=0):
    """uint8 [height, width, 3] with structure at every scale."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def decoder(name, size, **framing):
    return open_decoder(Framing(size, **framing), [name], 1)[0]


def one(name, blob, size, **framing):
    (result,) = decoder(name, size, **framing).decode([blob])
    return result


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


# Framing


@both
@pytest.mark.parametrize(("height", "width"), [(8, 15), (8, 14), (15, 8), (9, 10), (8, 8), (1, 40)])
def test_the_crop_starts_at_the_floor_of_half_the_rest(name, height, width):
    rows, columns = np.indices((height, width))
    pixels = np.stack([rows * 6, columns * 6, rows * 0 + 9], axis=2).astype(np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = one(name, encode(pixels), side)  # at its own size, so that no pixel is mixed
    assert np.array_equal(cut, pixels[top : top + side, left : left + side])


@both
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_before_the_crop(name, kind, orientation):
    pixels = np.zeros(
        (24, 31, 3), np.uint8
    )  # an odd rest: a crop before the turn would be off by one
    pixels[:12, :15], pixels[:12, 15:], pixels[12:, :15] = (
        (250, 20, 20),
        (20, 250, 20),
        (20, 20, 250),
    )
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[:, ::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[::-1],
    }[orientation]
    height, width = upright.shape[:2]
    top, left = (height - 24) // 2, (width - 24) // 2
    expected = upright[top : top + 24, left : left + 24].astype(int)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    got = one(name, encode(pixels, kind, exif=exif(orientation), **options), 24)
    worst = np.abs(got.astype(int) - expected)
    assert np.median(worst) <= 2 and (worst > 60).mean() < 0.02  # ringing of the JPEG at the edges


@needs_dali
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("crop", ["center", "none", "24x28", "24x28+3+1"])
@pytest.mark.parametrize(
    ("filter", "edge", "apart_share"),
    [("triangular", 2, 0), ("cubic", 6, 0.01), ("lanczos", 9, 0.02)],
)
def test_dali_and_pillow_agree_within_one_level(kind, crop, filter, edge, apart_share):
    """Inside: at the border DALI repeats the last pixel where Pillow cuts the kernel. Cubic and
    lanczos overshoot where the picture hardly shrinks or grows, and Pillow clips that between its
    two passes: few pixels, by a few levels.
    """
    shapes = [
        (200, 200),
        (178, 218),
        (89, 109),
        (64, 64),
        (70, 66),
        (301, 64),
        (640, 427),
        (30, 45),
    ]
    blobs = [encode(picture(*shape, seed=i), kind) for i, shape in enumerate(shapes)]
    framed = {"crop": crop, "filter": filter}
    by_pillow, by_dali = (
        decoder(name, 64, **framed).decode(blobs) for name in ("pillow", "dali-cpu")
    )
    for ours, theirs in zip(by_pillow, by_dali, strict=True):
        apart = np.abs(ours.astype(int) - theirs)
        inside = apart[edge:-edge, edge:-edge]
        assert (inside > 1).mean() <= apart_share and inside.max() <= (1 if not apart_share else 6)
        assert apart.mean() < 0.5
    # the test can see a shift: the same picture cut one pixel aside is far off
    shifted = encode(picture(*shapes[0])[:, 3:-1], kind)
    inside = np.abs(one("pillow", shifted, 64, **framed).astype(int) - by_dali[0])[edge:-edge]
    assert inside[:, edge:-edge].max() > 10


@needs_dali
def test_a_large_batch_gives_what_single_files_give():
    blobs = [encode(picture(40 + i, 60 - i, i), "JPEG" if i % 2 else "PNG") for i in range(20)]
    dali = decoder("dali-cpu", 32)
    alone = [dali.decode([blob])[0] for blob in blobs]
    assert all(map(np.array_equal, dali.decode(blobs), alone))


@needs_dali
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_pictures_are_decoded_in_small_groups(kind, monkeypatch):
    monkeypatch.setattr(dali_decoder, "GROUP_PIXELS", 5000)
    sizes = []
    frame = DaliDecoder._frame

    def counted(self, images):
        sizes.append(len(images.shape))
        return frame(self, images)

    dali = decoder("dali-cpu", 16)
    monkeypatch.setattr(DaliDecoder, "_frame", counted)
    blobs = [encode(picture(40, 40, i), kind) for i in range(7)] + [encode(picture(90, 90), kind)]
    results = dali.decode(blobs)
    assert sizes == [3, 3, 1, 1]
    for blob, result in zip(blobs, results, strict=True):
        apart = np.abs(one("pillow", blob, 16).astype(int) - result)[2:-2, 2:-2]
        assert apart.max() <= 1


# Kinds of pixels

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@both
def test_gray_palette_and_bilevel(name):
    gray = np.repeat(RAMP[:, :, None], 3, axis=2)
    assert np.array_equal(one(name, encode(RAMP), 8), gray)
    assert np.array_equal(one(name, encode(RAMP, "PPM"), 8), gray)
    indexed = Image.fromarray((RAMP // 4) % 4, "P")
    colours = np.array([(250, 1, 2), (3, 240, 4), (5, 6, 230), (90, 80, 70)], np.uint8)
    indexed.putpalette(colours.tobytes())
    assert np.array_equal(one(name, encode(indexed), 8), colours[(RAMP // 4) % 4])
    bits = RAMP % 3 == 0
    got = one(name, encode(Image.fromarray(bits)), 8)
    assert np.array_equal(got, np.repeat(bits[:, :, None], 3, axis=2) * np.uint8(255))


@both
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped_without_blending(name, kind):
    pixels = np.dstack([picture(8, 8), RAMP])  # transparent in one corner
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = one(name, encode(Image.fromarray(pixels), kind, **options), 8)
    assert np.array_equal(got, pixels[:, :, :3])


@both
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_and_not_clipped(name, kind):
    wide = (np.arange(64, dtype=np.uint32) * 1040).astype(np.uint16).reshape(8, 8)
    expected = np.rint(wide / 257).astype(np.uint8)
    if kind == "PPM":
        blob = b"P5\n8 8\n65535\n" + wide.astype(">u2").tobytes()
    else:
        blob = encode(wide, kind)
    assert np.array_equal(one(name, blob, 8), np.repeat(expected[:, :, None], 3, axis=2))


@both
def test_a_pgm_is_scaled_by_its_own_maximum(name):
    blob = b"P5\n8 8\n63\n" + (RAMP // 4).tobytes()
    expected = np.rint(RAMP / 4 * 255 / 63)
    assert np.abs(one(name, blob, 8)[:, :, 0] - expected).max() <= 1


@both
def test_cmyk_jpeg(name):
    colours = Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK")
    got = one(name, encode(colours, "JPEG", quality=95), 16)
    assert np.abs(got.astype(int) - (200, 60, 30)).max() <= 4


@both
def test_floats_are_refused_rather_than_guessed(name):
    blob = encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")
    assert one(name, blob, 8) == "unsupported: TIFF with pixels of mode F"


# Damage


def png(width, height, data=b""):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", data or zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def jpeg_of_size(width, height):
    """A small JPEG whose header claims other sides."""
    blob = encode(picture(16, 16), "JPEG")
    frame = blob.index(b"\xff\xc0") + 5
    return blob[:frame] + struct.pack(">HH", height, width) + blob[frame + 4 :]


def damaged():
    jpeg = encode(picture(90, 70), "JPEG")
    whole_png = encode(picture(90, 70))
    at = whole_png.index(b"IDAT")
    return {
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "truncated PNG": whole_png[: len(whole_png) // 2],
        "empty file": b"",
        "not an image": b"just text, " * 20,
        "too large": png(12_000, 9_000),
        "too large ": png(65_535, 65_535),
        "too large  ": jpeg_of_size(20_000, 20_000),
        "damaged JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(40),
        "truncated PNG ": whole_png[: at - 4] + b"\x7f\xff\xff\xf0" + whole_png[at:-900],
        "damaged PNG": whole_png[: at + 100] + bytes(50) + whole_png[at + 150 :],
    }


@both
def test_damage_is_refused_file_by_file_with_its_kind(name):
    sound = [encode(picture(50 + i, 60, i), "JPEG" if i % 2 else "PNG") for i in range(10)]
    bad = damaged()
    mixed = [blob for pair in zip(sound, bad.values(), strict=True) for blob in pair]
    opened = decoder(name, 32)
    results = opened.decode(mixed)
    alone = [opened.decode([blob])[0] for blob in sound]
    for result, expected in zip(results[::2], alone, strict=True):
        assert np.array_equal(result, expected)
    kinds = [str(reason).partition(":")[0] for reason in results[1::2]]
    assert kinds == [kind.strip() for kind in bad]
    assert all("\n" not in reason and len(reason) < 160 for reason in results[1::2])
    assert results[9] == "too large: 12000x9000 is over 64,000,000 pixels (--max-pixels)"


@both
def test_pictures_up_to_the_limit_are_taken(name):
    opened = decoder(name, 8, max_pixels=40 * 50, min_size=20)
    blobs = [encode(picture(*sides)) for sides in ((40, 50), (40, 51), (20, 30), (19, 30))]
    taken, large, least, small = opened.decode(blobs)
    assert taken.shape == least.shape == (8, 8, 3)
    assert large == "too large: 51x40 is over 2,000 pixels (--max-pixels)"
    assert small == "too small: 30x19 is under 20 pixels (--min-size)"


@both
@pytest.mark.parametrize("orientation", [1, 6])
def test_crops_are_taken_from_the_upright_picture(name, orientation):
    pixels = picture(30, 40)
    upright = pixels if orientation == 1 else np.rot90(pixels, -1)
    blob = encode(pixels, exif=exif(orientation))
    height, width = upright.shape[:2]
    assert np.array_equal(one(name, blob, 17, crop="17x17+9+12"), upright[12:29, 9:26])
    left, top = (width - 21) // 2, (height - 21) // 2
    assert np.array_equal(one(name, blob, 21, crop="21x21"), upright[top : top + 21, left:][:, :21])
    tall = one(name, blob, 16, crop="10x31+20+8")  # inside of the upright one only if it is turned
    assert isinstance(tall, np.ndarray) == (orientation == 6)
    whole = one(name, blob, 16, crop="none").astype(int)
    expected = np.asarray(Image.fromarray(upright).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(whole - expected)[2:-2, 2:-2].max() <= 1


@both
def test_a_crop_that_does_not_fit_refuses_one_and_not_its_neighbours(name):
    blobs = [encode(picture(*sides)) for sides in ((40, 40), (23, 40), (24, 24), (40, 23))]
    results = decoder(name, 24, crop="24x24").decode(blobs)
    assert results[1] == "too small: 40x23 does not hold --crop 24x24"
    assert results[3] == "too small: 23x40 does not hold --crop 24x24"
    assert np.array_equal(results[0], picture(40, 40)[8:32, 8:32])
    assert np.array_equal(results[2], picture(24, 24))


@pytest.mark.parametrize(
    "text", ["centre", "", "0x10", "10x0", "10", "10x10+5", "10x10+-1+5", "10X10", "1e2x5", "٣x٣"]
)
def test_malformed_crops(text):
    with pytest.raises(ValueError, match="must be center, none, WxH or WxH"):
        Crop(text)


@both
def test_enlarged_pictures_are_counted(name):
    opened = decoder(name, 32, crop="20x40")
    opened.decode([encode(picture(50, 50), kind) for kind in ("PNG", "JPEG", "BMP")])
    assert opened.enlarged == 3
    opened = decoder(name, 32)
    opened.decode([encode(picture(32, 50), kind) for kind in ("PNG", "JPEG", "BMP")])
    assert opened.enlarged == 0


@both
def test_odd_files(name):
    """Each kind of file by the pixels it was made of, or refused for what is wrong with it."""
    odd = [file for file in odd_files() if file.link is None]
    assert len(odd) > 100 and sum(file.pixels is None for file in odd) >= 40
    wrong = []
    for file in odd:
        side = 16 if file.pixels is None else min(file.pixels.shape[:2])  # nothing is resampled
        got = one(name, file.blob, side)
        if file.pixels is None:
            fits = isinstance(got, str) and got.startswith(file.reason)
        else:
            height, width = file.pixels.shape[:2]
            top, left = (height - side) // 2, (width - side) // 2
            expected = file.pixels[top : top + side, left : left + side].astype(int)
            fits = not isinstance(got, str) and np.abs(got - expected).max() <= file.tolerance
        if not fits:
            wrong.append(f"{file.name}: {got if isinstance(got, str) else 'other pixels'}")
    assert not wrong, "\n".join(wrong)


@needs_dali
def test_what_dali_refuses_pillow_decodes():
    pixels = picture(40, 40)
    cut = encode(pixels)[:-2]  # the end of IEND's checksum: all pixels are there
    dali = decoder("dali-cpu", 40)
    result, other = dali.decode([cut, encode(pixels)])
    assert np.array_equal(result, pixels) and np.array_equal(other, pixels)
    assert dali.by_pillow == 1


@needs_dali
def test_dali_that_stops_working_is_not_taken_for_bad_files(monkeypatch):
    """A lost CUDA context refuses all that comes; Pillow on one core would go on in silence."""
    dali = decoder("dali-cpu", 16)
    files = [encode(picture(40, 40, i), "JPEG") for i in range(4)]
    assert all(isinstance(square, np.ndarray) for square in dali.decode(files))
    bad = [file[:200] for file in files]
    assert all(isinstance(reason, str) for reason in dali.decode(bad))  # it still works
    enlarged = dali.enlarged

    def lost(self, blobs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DaliDecoder, "_batch", lost)
    with pytest.raises(dali_decoder.Unavailable, match="fails on a known JPEG .*illegal memory"):
        dali.decode(files)
    assert dali.enlarged == enlarged and dali.framing.size == 16


def test_a_jpeg_with_a_damaged_exif_block_is_sound():
    blob = encode(picture(24, 24), "JPEG", exif=b"Exif\0\0garbage")
    plain = encode(picture(24, 24), "JPEG")
    for name in HERE:
        assert np.array_equal(one(name, blob, 24), one(name, plain, 24))


def test_chunks_of_a_png():
    whole = encode(picture(9, 9))
    assert png_route(whole) == png_route(whole + b"trailing") == "rgb8"
    assert all(png_route(whole[:end]) == "odd" for end in range(len(whole)))
    for pixels in (RAMP, np.dstack([picture(9, 9), picture(9, 9)[:, :, 0]])):
        assert png_route(encode(pixels)) == "other"
    assert png_route(encode(picture(9, 9), exif=exif(6))) == "other"
    assert png_route(encode(picture(9, 9), transparency=(1, 2, 3))) == "other"
    assert png_route(encode(Image.fromarray(picture(9, 9)), save_all=True)) == "rgb8"


def test_exif_of_a_jpeg():
    sound = encode(picture(24, 24), "JPEG", exif=exif(6))
    assert jpeg_route(sound) == jpeg_route(encode(picture(24, 24), "JPEG")) == "other"
    at = sound.index(b"Exif") + 6
    count = at + int.from_bytes(
        sound[at + 4 : at + 8], "big" if sound[at : at + 2] == b"MM" else "little"
    )
    for damage in (b"\x48\x01", b"\xff\xff"):
        wild = sound[:count] + damage + sound[count + 2 :]
        assert jpeg_route(wild) == "odd"
        for name in HERE:  # the picture is sound, its orientation is lost
            assert np.array_equal(one(name, wild, 24), one("pillow", wild, 24))
    assert jpeg_route(sound[:at] + b"XX" + sound[at + 2 :]) == "odd"
    assert all(jpeg_route(sound[:end]) in ("other", "odd") for end in range(len(sound)))


def test_plain_pngs_of_all_sides_and_compressions():
    png = PngDecoder()
    assert not png.lack
    for i, sides in enumerate([(1, 1), (1, 90), (90, 1), (64, 64), (37, 52), (200, 301)]):
        pixels = picture(*sides, seed=i)
        for options in ({}, {"compress_level": 0}, {"optimize": True}):
            blob = encode(pixels, **options)
            assert png_route(blob) == "rgb8" and np.array_equal(png.decode(blob), pixels)
        assert png.decode(blob[:-40] + bytes(40)) is None


@both
def test_without_kornia_rs_the_others_decode_pngs(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia_rs", None)
    opened, faults = open_decoder(Framing(40), [name], 1)
    assert len(faults) == 1 and faults[0].startswith("no kornia-rs")
    assert np.array_equal(opened.decode([encode(picture(40, 40))])[0], picture(40, 40))


# Choice


def test_a_broken_decoder_is_passed_over_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", None)
    chosen, faults = open_decoder(Framing(16), ALL, 1)
    assert chosen.name == "pillow"
    assert [fault.partition(" (")[0] for fault in faults] == [
        "no dali-gpu: DALI cannot be imported",
        "no dali-cpu: DALI cannot be imported",
    ]
    with pytest.raises(RunError, match="no dali-cpu: DALI cannot be imported"):
        open_decoder(Framing(16), ["dali-cpu"], 1)


@needs_dali
@pytest.mark.parametrize("fault", ["raises", "wrong colours"])
def test_the_probe_finds_a_gpu_that_decodes_wrongly(monkeypatch, fault):
    batch = DaliDecoder._batch

    def faulty(self, blobs):
        if self._device == "cpu":
            return batch(self, blobs)
        if fault == "raises":
            raise RuntimeError("Critical error:\nnvJPEG is not to be found\n")
        self._device = "cpu"
        return [square[..., ::-1] for square in batch(self, blobs)]

    monkeypatch.setattr(DaliDecoder, "_batch", faulty)
    chosen, faults = open_decoder(Framing(16, min_size=500), ALL, 1)
    assert chosen.name == "dali-cpu" and chosen.enlarged == 0
    said = "nvJPEG is not to be found" if fault == "raises" else "wrong colours"
    assert faults[0].startswith("no dali-gpu: ") and said in faults[0]
    assert chosen.decode([encode(picture(40, 40))]) == [
        "too small: 40x40 is under 500 pixels (--min-size)"
    ]


@needs_dali
@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    blobs = [encode(picture(200, 178, i), "JPEG" if i % 2 else "PNG") for i in range(16)]
    on_gpu, on_cpu = (decoder(name, 64).decode(blobs) for name in ("dali-gpu", "dali-cpu"))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        apart = np.abs(ours.astype(int) - theirs)
        assert apart.max() <= 6 and apart.mean() < 1  # nvJPEG's inverse transform rounds otherwise
