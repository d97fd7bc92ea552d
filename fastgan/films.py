"""Films: frames, one after another, into an animated WebP or GIF (Pillow) or an MP4 (ffmpeg)."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from PIL import Image

from . import console
from .durable import beside
from .errors import RunError, UsageError
from .paths import picture_file

SUFFIXES = (".webp", ".gif", ".mp4")
SEEN_SIDE = 256  # what frames are magnified to: 64 px are a stamp on today's screens
MAX_SIDE = 4096  # the widest that H.264 players take (level 5.1); WebP ends at 16,383
WEBP_QUALITY = 80
# Browsers show a GIF's frames of less than 20 ms for 100.
GIF_FPS = 50
GIF_PIXELS = 1 << 30  # of all frames: Pillow holds them, a byte each


def film_file(path: Path, flag: str, fps: float) -> Path:
    """`path` as a film that can be written here: its folder there or made, its suffix known, and
    ffmpeg installed for what needs it.
    """
    suffix = path.suffix.lower()
    if suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise UsageError(
            f"{flag} {path}: an .mp4 is written by ffmpeg, which is not on the PATH: install it "
            "(apt install ffmpeg), or take .webp, which browsers play, too"
        )
    if suffix == ".gif" and fps > GIF_FPS:
        raise UsageError(f"--fps must be at most {GIF_FPS} for a .gif, got {fps:g}")
    return picture_file(path, SUFFIXES, flag)


def magnification(sides: tuple[int, int], scale: int | None, strip: int = 0) -> int:
    """How many times frames of this width and height are magnified: `scale`, or as often as makes
    their shorter side `SEEN_SIDE` or a little more. `strip` pixels come below them.

    Raises:
        UsageError: they would be larger than any film's, by `--scale` or as they are.
    """
    usual = min(-(-SEEN_SIDE // min(sides)), (MAX_SIDE - strip) // max(sides))
    times = scale or max(usual, 1)
    width, height = sides[0] * times, sides[1] * times + strip
    if max(width, height) > MAX_SIDE:
        flag = f"--scale {scale}" if scale else "--grid"
        raise UsageError(
            f"{flag}: frames would be {width:,}x{height:,} px; at most {MAX_SIDE:,} are allowed"
        )
    return times


def magnified(frame: Image.Image, times: int) -> Image.Image:
    """Each pixel as a square of `times` x `times`: nothing that the generator did not make."""
    sides = (frame.width * times, frame.height * times)
    return frame.resize(sides, Image.Resampling.NEAREST) if times > 1 else frame


def write_film(
    frames: Iterable[Image.Image], path: Path, count: int, fps: float, hold_s: float = 0.0
) -> None:
    """Write `count` RGB frames of one size, 2 at the least; the last one is shown for `hold_s` if
    that is longer. A WebP or GIF begins again at its end.

    Frames are taken as they are needed: a WebP holds what is encoded, a GIF all of them at a byte a
    pixel. Nothing stays of a film that is not whole.

    Raises:
        UsageError: a GIF would be too large.
        RunError: the file cannot be written.
    """
    with console.bar("filming", count, "frames") as bar, beside(path, shared=True) as scratch:
        counted = _counted(frames, bar)
        first = next(counted)
        suffix = path.suffix.lower()
        try:
            if suffix == ".mp4":
                _mp4(chain([first], counted), scratch, fps, hold_s)
            elif suffix == ".gif":
                _gif(chain([first], counted), scratch, count, durations_ms(count, fps, hold_s, 10))
            else:
                rest = _Frames(counted, count - 1, first)
                first.save(
                    scratch,
                    "WEBP",
                    save_all=True,
                    append_images=[rest],
                    duration=durations_ms(count, fps, hold_s, 1),
                    loop=0,
                    quality=WEBP_QUALITY,
                )
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be written: {error}") from None


def durations_ms(count: int, fps: float, hold_s: float, unit_ms: int) -> list[int]:
    """How long each frame is shown, in a format that counts in `unit_ms`: each ends as near as can
    be to where it should, so that the film is as long as it should be.
    """
    ends = [round(i * 1000 / fps / unit_ms) * unit_ms for i in range(count + 1)]
    durations = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    durations[-1] = max(durations[-1], round(hold_s * 1000 / unit_ms) * unit_ms)
    return durations


def _counted(frames: Iterable[Image.Image], bar: console.Bar) -> Iterator[Image.Image]:
    for done, frame in enumerate(frames, 1):
        yield frame
        bar.update(done)


class _Frames(Image.Image):
    """Frames that are yet to be made, as Pillow takes a file of several: one at a time, in their
    order. A list of images would have to be whole before the first is encoded.
    """

    def __init__(self, frames: Iterator[Image.Image], count: int, like: Image.Image) -> None:
        super().__init__()
        self._mode, self._size = like.mode, like.size  # as a plugin of Pillow sets them
        self._frames, self.n_frames = frames, count

    def seek(self, frame: int) -> None:
        self.im = next(self._frames).im


def _gif(frames: Iterator[Image.Image], path: Path, count: int, durations: list[int]) -> None:
    first = next(frames)
    if count * first.width * first.height > GIF_PIXELS:
        raise UsageError(
            f"a .gif of {count:,} frames of {first.width}x{first.height} px is too large: take "
            ".webp or .mp4, or less of --scale, --frames or --grid"
        )
    # each frame has 256 colours of its own: the first one's do not suit what comes after
    reduced = (frame.quantize(256, Image.Quantize.MEDIANCUT) for frame in chain([first], frames))
    next(reduced).save(
        path, "GIF", save_all=True, append_images=reduced, duration=durations, loop=0
    )


def _mp4(frames: Iterator[Image.Image], path: Path, fps: float, hold_s: float) -> None:
    """H.264 in 4:2:0, which every player has; `OSError` with ffmpeg's own words where it fails."""
    first = _even(next(frames))
    with tempfile.TemporaryFile() as said:
        command = _ffmpeg(first.size, fps, path)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said
        )
        assert process.stdin is not None
        try:
            last = first
            with suppress(BrokenPipeError):  # it has ended, and says why
                for frame in chain([first], frames):
                    last = _even(frame)
                    process.stdin.write(last.tobytes())
                for _ in range(round(hold_s * fps) - 1):
                    process.stdin.write(last.tobytes())
            with suppress(BrokenPipeError):
                process.stdin.close()
            code = process.wait()
        finally:
            process.kill()  # nothing, if it has ended
            process.wait()
            with suppress(OSError):  # what is left for nobody
                process.stdin.close()
        said.seek(0)
        words = said.read().decode(errors="replace").strip()
    if code or not path.is_file():
        # of its lines the first one is the cause, the others what came of it
        raise OSError(f"ffmpeg: {words.splitlines()[0] if words else f'it ended with {code}'}")


def _ffmpeg(sides: tuple[int, int], fps: float, path: Path) -> list[str]:
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{sides[0]}x{sides[1]}"]
    # as players take films that say nothing: by BT.709, and said
    colours = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-pix_fmt", "yuv420p"]
    tags = [
        word
        for name in ("colorspace", "color_primaries", "color_trc")
        for word in (f"-{name}", "bt709")
    ]
    return [
        *("ffmpeg", "-hide_banner", "-loglevel", "error", "-y"),
        *(*raw, "-framerate", f"{fps:g}", "-i", "pipe:0"),
        *("-c:v", "libx264", "-crf", "18", *colours, *tags),
        *("-movflags", "+faststart", "-f", "mp4", str(path.absolute())),
    ]


def _even(frame: Image.Image) -> Image.Image:
    """With a white row and column more where sides are odd, which 4:2:0 does not have."""
    sides = (frame.width + frame.width % 2, frame.height + frame.height % 2)
    if sides == frame.size:
        return frame
    canvas = Image.new("RGB", sides, "white")
    canvas.paste(frame)
    return canvas
