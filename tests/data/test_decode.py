"""Decoders against known pixels and against each other; damaged files by name and alone."""

import io
import os
import platform
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from fastgan.data import decode
from fastgan.data.decode import DaliDecoder, PillowDecoder, open_decoder, png_chunks_fit
from fastgan.data.quiet import quiet
from fastgan.errors import RunError

HAS_DALI_WHEEL = sys.platform == "linux" and platform.machine() == "x86_64"
DECODERS = ["pillow"] + (["dali-cpu"] if HAS_DALI_WHEEL else [])
needs_dali = pytest.mark.skipif(not HAS_DALI_WHEEL, reason="no DALI wheel for this platform")
both = pytest.mark.parametrize("name", DECODERS)


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


def one(name, blob, size):
    (result,) = open_decoder(size, name).decode([blob])
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
def test_dali_and_pillow_agree_within_one_level(kind):
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
    by_pillow, by_dali = (open_decoder(64, name).decode(blobs) for name in ("pillow", "dali-cpu"))
    for ours, theirs in zip(by_pillow, by_dali, strict=True):
        apart = np.abs(ours.astype(int) - theirs)
        # At the border DALI repeats the last pixel, Pillow cuts the kernel: up to two rows of it.
        assert apart[2:-2, 2:-2].max() <= 1
        assert apart.mean() < 0.5
    # the test can see a shift: the same picture cut one pixel aside is far off
    shifted = encode(picture(*shapes[0])[:, 3:-1], kind)
    assert np.abs(one("pillow", shifted, 64).astype(int) - by_dali[0])[2:-2, 2:-2].max() > 10


@needs_dali
def test_a_large_batch_gives_what_single_files_give():
    blobs = [encode(picture(40 + i, 60 - i, i), "JPEG" if i % 2 else "PNG") for i in range(20)]
    decoder = open_decoder(32, "dali-cpu")
    alone = [decoder.decode([blob])[0] for blob in blobs]
    assert all(map(np.array_equal, decoder.decode(blobs), alone))


@needs_dali
def test_large_pictures_are_decoded_in_small_groups(monkeypatch):
    monkeypatch.setattr(decode, "GROUP_PIXELS", 5000)
    sizes = []
    batch = DaliDecoder._batch

    def counted(self, blobs):
        sizes.append(len(blobs))
        return batch(self, blobs)

    decoder = open_decoder(16, "dali-cpu")
    monkeypatch.setattr(DaliDecoder, "_batch", counted)
    blobs = [encode(picture(40, 40, i)) for i in range(7)] + [encode(picture(90, 90))]
    results = decoder.decode(blobs)
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
def test_damage_is_refused_file_by_file_with_its_kind(name, capfd):
    sound = [encode(picture(50 + i, 60, i), "JPEG" if i % 2 else "PNG") for i in range(10)]
    bad = damaged()
    mixed = [blob for pair in zip(sound, bad.values(), strict=True) for blob in pair]
    decoder = open_decoder(32, name)
    results = decoder.decode(mixed)
    alone = [decoder.decode([blob])[0] for blob in sound]
    for result, expected in zip(results[::2], alone, strict=True):
        assert np.array_equal(result, expected)
    kinds = [str(reason).partition(":")[0] for reason in results[1::2]]
    assert kinds == [kind.strip() for kind in bad]
    assert all("\n" not in reason and len(reason) < 160 for reason in results[1::2])
    assert results[9] == "too large: 12000x9000 is over 64,000,000 pixels"
    assert capfd.readouterr() == ("", "")


@both
def test_pictures_up_to_the_limit_are_taken(name, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 40 * 50)
    decoder = open_decoder(8, name)
    taken, refused = decoder.decode([encode(picture(40, 50)), encode(picture(40, 51))])
    assert taken.shape == (8, 8, 3)
    assert refused == "too large: 51x40 is over 2,000 pixels"


@needs_dali
def test_what_dali_refuses_pillow_decodes():
    pixels = picture(40, 40)
    cut = encode(pixels)[:-2]  # the end of IEND's checksum: all pixels are there
    decoder = open_decoder(40, "dali-cpu")
    result, other = decoder.decode([cut, encode(pixels)])
    assert np.array_equal(result, pixels) and np.array_equal(other, pixels)
    assert decoder.by_pillow == 1


def test_a_jpeg_with_a_damaged_exif_block_is_sound(capfd):
    blob = encode(picture(24, 24), "JPEG", exif=b"Exif\0\0garbage")
    plain = encode(picture(24, 24), "JPEG")
    for name in DECODERS:
        assert np.array_equal(one(name, blob, 24), one(name, plain, 24))
    assert capfd.readouterr() == ("", "")


def test_chunks_of_a_png():
    whole = encode(picture(9, 9))
    assert png_chunks_fit(whole) and png_chunks_fit(whole + b"trailing")
    assert not any(png_chunks_fit(whole[:end]) for end in range(len(whole)))


# Silence


def test_only_the_c_libraries_are_silenced(capfd):
    with quiet():
        os.write(2, b"libpng error: from C\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_python_can_still_warn_from_another_thread():
    code = (
        "import os, sys, threading; from fastgan.data.quiet import quiet\n"
        "def warn(): print('from a thread', file=sys.stderr)\n"
        "with quiet():\n"
        "    os.write(2, b'from C')\n"
        "    t = threading.Thread(target=warn); t.start(); t.join()\n"
        "print('after', file=sys.stderr)\n"
        "os.close(2)\n"
        "with quiet(): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "from a thread\nafter\n")


def test_decoders_in_two_threads_leave_stderr_as_it_was(capfd):
    blobs = [encode(picture(50, 50, i), "JPEG")[:900] for i in range(30)]

    def work():
        decoder = PillowDecoder(16)
        for _ in range(10):
            decoder.decode(blobs)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


# Choice


def test_a_broken_decoder_is_passed_over_with_the_reason(monkeypatch):
    decoder = open_decoder(16)
    assert decoder.name == "pillow" or HAS_DALI_WHEEL
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", None)
    decoder = open_decoder(16)
    assert decoder.name == "pillow"
    assert "no dali-cpu: DALI cannot be imported" in decoder.why and "no dali-gpu" in decoder.why
    with pytest.raises(RunError, match="no dali-cpu: DALI cannot be imported"):
        open_decoder(16, "dali-cpu")


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
        return batch(self, blobs)[..., ::-1]

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(DaliDecoder, "_batch", faulty)
    decoder = open_decoder(16)
    assert decoder.name == "dali-cpu"
    said = "nvJPEG is not to be found" if fault == "raises" else "wrong colours"
    assert decoder.why.startswith("no dali-gpu: ") and said in decoder.why


@needs_dali
def test_no_gpu_is_said_plainly(monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    decoder = open_decoder(16)
    assert (decoder.name, decoder.why) == ("dali-cpu", decode.NO_GPU)
    assert capfd.readouterr() == ("", "")


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="dali-gpu, dali-cpu, pillow; got 'gpu'"):
        open_decoder(16, "gpu")
    with pytest.raises(ValueError, match="size must be 1 or more"):
        open_decoder(0)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this GPU machine")
    blobs = [encode(picture(200, 178, i), "JPEG" if i % 2 else "PNG") for i in range(16)]
    on_gpu, on_cpu = (open_decoder(64, name).decode(blobs) for name in ("dali-gpu", "dali-cpu"))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        apart = np.abs(ours.astype(int) - theirs)
        assert apart.max() <= 6 and apart.mean() < 1  # nvJPEG's inverse transform rounds otherwise
