"""Films, decoded again: as many frames, as long, and as they were drawn; and nothing of one that
was stopped half-way.
"""

import os
import shutil
import stat
import subprocess
import weakref

import numpy as np
import pytest
from PIL import Image

from fastgan import films
from fastgan.errors import RunError, UsageError
from fastgan.films import durations_ms, film_file, magnification, magnified, write_film

# Two mid levels of 256 on average: what WebP at quality 80 and 256 colours a frame are within on
# smooth pictures; another frame of the film is ten times as far.
CLOSE = 4.0


def drawn(count, width=48, height=40, seed=0):
    """Smooth pictures, each of other colours than the one before."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        corners = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        yield Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def decoded(path):
    """Frames as float [H, W, 3], and how long each is shown in ms."""
    frames, durations = [], []
    with Image.open(path) as film:
        for i in range(film.n_frames):
            film.seek(i)
            frames.append(np.asarray(film.convert("RGB"), float))
            durations.append(film.info["duration"])
    return frames, durations


def distance(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


@pytest.mark.parametrize(("suffix", "unit"), [(".webp", 1), (".gif", 10)])
@pytest.mark.parametrize("sides", [(48, 40), (65, 33)])
def test_a_film_is_as_it_was_drawn(tmp_path, suffix, unit, sides):
    path, wanted = tmp_path / f"film{suffix}", list(drawn(13, *sides))
    write_film(drawn(13, *sides), path, 13, 30, hold_s=0.7)
    frames, durations = decoded(path)
    assert len(frames) == 13 and all(frame.shape == (sides[1], sides[0], 3) for frame in frames)
    apart = np.array([[distance(frame, other) for other in wanted] for frame in frames])
    assert apart.diagonal().max() < CLOSE
    assert (apart.argmin(1) == np.arange(13)).all()
    assert durations == durations_ms(13, 30, 0.7, unit)
    assert durations[-1] == 700 and sum(durations[:-1]) == 400
    assert os.listdir(tmp_path) == [path.name]
    with Image.open(path) as film:
        assert film.info["loop"] == 0


def test_a_film_is_as_long_as_its_frames_say():
    for fps, unit in ((30, 10), (30, 1), (24, 10), (7.3, 10), (120, 1)):
        durations = durations_ms(300, fps, 0.0, unit)
        assert abs(sum(durations) - 300_000 / fps) <= unit / 2
        assert all(abs(ms - 1000 / fps) <= unit and ms % unit == 0 for ms in durations)
    assert sum(durations_ms(300, 30, 0.0, 10)) == 10_000  # 9,000 with each frame rounded by itself


def test_a_webp_holds_no_frames_but_those_it_encodes(tmp_path):
    alive, most = weakref.WeakValueDictionary(), 0

    def frames():
        nonlocal most
        for number, frame in enumerate(drawn(40)):
            alive[number] = frame
            most = max(most, len(alive))
            yield frame
            del frame

    write_film(frames(), tmp_path / "film.webp", 40, 30)
    assert 1 <= most <= 4


def fake_ffmpeg(folder, monkeypatch, script):
    """An `ffmpeg` of our own, alone on the PATH with the tools that it needs."""
    bin_ = folder / "bin"
    bin_.mkdir()
    for tool in ("cat", "sleep", "dd"):
        (bin_ / tool).symlink_to(shutil.which(tool))
    path = bin_ / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(bin_))


KEEPS = 'for last; do :; done; echo "$*" > "$SAID"; cat > "$last"'


def test_ffmpeg_gets_the_frames_of_even_sides_and_the_last_one_for_longer(tmp_path, monkeypatch):
    fake_ffmpeg(tmp_path, monkeypatch, KEEPS)
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    path, wanted = tmp_path / "out" / "film.mp4", list(drawn(5, 31, 22))
    assert film_file(path, "--out", 12.5) == path
    write_film(iter(wanted), path, 5, 12.5, hold_s=0.4)
    said = (tmp_path / "said").read_text()
    for words in (
        "-f rawvideo -pix_fmt rgb24 -s 32x22 -framerate 12.5 -i pipe:0",
        "-c:v libx264",
        "-pix_fmt yuv420p",
        "-f mp4",
    ):
        assert words in said
    frames = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 22, 32, 3)
    assert len(frames) == 5 + 4  # 0.4 s are 5 frames, one of them there already
    for frame, picture in zip(frames, [*wanted, *[wanted[-1]] * 4], strict=True):
        assert np.array_equal(frame[:, :31], np.asarray(picture)) and (frame[:, 31:] == 255).all()
    assert os.listdir(path.parent) == ["film.mp4"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'Unknown encoder libx264' >&2; echo 'Error opening output' >&2; exit 1", "Unknown"),
        ("dd bs=1000 count=1 of=/dev/null 2> /dev/null; echo 'No space left' >&2; exit 1", "No sp"),
        ("cat > /dev/null; exit 3", "it ended with 3"),
        ("cat > /dev/null", "it ended with 0"),  # and wrote nothing
    ],
)
def test_what_ffmpeg_says_is_said_in_a_line(tmp_path, monkeypatch, script, words):
    fake_ffmpeg(tmp_path, monkeypatch, script)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "film.mp4"
    with pytest.raises(RunError, match=f"film.mp4 cannot be written: ffmpeg: {words}") as raised:
        write_film(drawn(200), path, 200, 30)
    assert "\n" not in str(raised.value) and os.listdir(path.parent) == []


def test_without_ffmpeg_another_suffix_is_offered(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"--out .*film.mp4: .*ffmpeg.* not on the PATH.*\.webp"):
        film_file(tmp_path / "film.mp4", "--out", 30)
    assert film_file(tmp_path / "film.webp", "--out", 30) == tmp_path / "film.webp"


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_an_mp4_is_as_it_was_drawn(tmp_path):
    path, wanted = tmp_path / "film.mp4", list(drawn(7, 129, 96))
    write_film(iter(wanted), path, 7, 10, hold_s=0.3)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-vf", "scale=in_color_matrix=bt709", *raw],
        capture_output=True,
        check=True,
    )
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, 96, 130, 3)
    assert len(frames) == 9
    for frame, picture in zip(frames, [*wanted, wanted[-1], wanted[-1]], strict=True):
        assert distance(frame[:, :128], np.asarray(picture)[:, :128]) < CLOSE


@pytest.mark.parametrize("suffix", films.SUFFIXES)
def test_a_film_that_is_stopped_leaves_what_was_there(tmp_path, monkeypatch, suffix):
    fake_ffmpeg(tmp_path, monkeypatch, "cat > /dev/null; sleep 60")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / f"film{suffix}"
    path.write_bytes(b"the one before")

    def frames():
        yield from drawn(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_film(frames(), path, 9, 30)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == b"the one before"


def test_films_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"--out must end in \.webp, \.gif, \.mp4, got .*a\.png"):
        film_file(tmp_path / "a.png", "--out", 30)
    with pytest.raises(UsageError, match="--fps must be at most 50 for a .gif, got 60"):
        film_file(tmp_path / "a.gif", "--out", 60)
    assert film_file(tmp_path / "a.GIF", "--out", 50)
    monkeypatch.setattr(films, "GIF_PIXELS", 9 * 48 * 40)
    write_film(drawn(9), tmp_path / "a.gif", 9, 30)
    with pytest.raises(UsageError, match="a .gif of 10 frames of 48x40 px is too large"):
        write_film(drawn(10), tmp_path / "b.gif", 10, 30)
    for suffix in (".webp", ".gif"):
        with pytest.raises(RunError, match="cannot be written"):
            write_film(drawn(2), tmp_path / "none" / f"a{suffix}", 2, 30)
    assert os.listdir(tmp_path) == ["a.gif"]


def test_frames_are_magnified_until_they_are_seen():
    wanted = {(64, 64): 4, (48, 48): 6, (256, 256): 1, (255, 300): 2, (134, 266): 2, (5000, 9): 1}
    wanted |= {(36, 546): 7}  # 8 would be wider than any film
    for sides, times in list(wanted.items()):
        if max(sides) > films.MAX_SIDE:
            with pytest.raises(UsageError, match="--grid: frames would be 5,000x9 px; at most 4,0"):
                magnification(sides, None)
        else:
            assert magnification(sides, None) == times
    assert magnification((64, 64), 1) == 1
    with pytest.raises(UsageError, match="--scale 65: frames would be 4,160x4,160 px"):
        magnification((64, 64), 65)
    (picture,) = drawn(1, 5, 4)
    larger = np.asarray(magnified(picture, 3))
    assert np.array_equal(larger, np.asarray(picture).repeat(3, 0).repeat(3, 1))
