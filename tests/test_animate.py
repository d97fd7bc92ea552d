"""A run's grids as a film: in the order of training, what cannot be shown named."""

import os

import numpy as np
import pytest
from PIL import Image

from fastgan import animate as module
from fastgan.cli import main

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def a_run(path, grids, sides=(66, 70)):
    """A run folder with a grid of one colour for each of these thousands of images."""
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    for kimg, colour in grids.items():
        Image.new("RGB", sides, colour).save(path / "samples" / f"fake-{kimg}kimg.png")
    return path


def four(path, **more):
    kimg = ("000000.000", "000000.064", "000099.500", "1000000.000")  # not by their letters
    return a_run(path, dict(zip(kimg, COLOURS, strict=True)), **more)


def shown(path):
    """Of each frame its colour in the middle, how long it is shown in ms, and the strip below."""
    found = []
    with Image.open(path) as film:
        for i in range(film.n_frames):
            film.seek(i)
            frame = np.asarray(film.convert("RGB"), int)
            middle = frame[(film.height - 32) // 2, film.width // 2]
            found.append(
                (middle, film.info["duration"], frame[-26:])
            )  # of 32: the colour above runs over
    return found


@pytest.mark.parametrize("out", ["training.webp", "other.gif"])
def test_grids_in_the_order_of_training(tmp_path, capsys, out):
    run = four(tmp_path / "run")
    args = ["--out", str(run / out), "--fps=4", "--hold=1.5"] if out == "other.gif" else []
    assert main(["animate", str(run), *args]) == 0
    frames = shown(run / out)
    for (colour, _, _), wanted in zip(frames, COLOURS, strict=True):
        assert np.abs(colour - wanted).max() < 12
    assert [ms for _, ms, _ in frames] == ([250] * 3 + [1500] if args else [125] * 3 + [2000])
    with Image.open(run / out) as film:
        assert film.size == (4 * 66, 4 * 70 + 32)  # to 256 px and a little more
    strips = [strip for _, _, strip in frames]
    assert all((strip < 60).sum() > 100 and (strip[:, -60:] > 240).all() for strip in strips)
    apart = [np.abs(a - b).max() for i, a in enumerate(strips) for b in strips[:i]]
    assert min(apart) > 100  # each has a number of its own
    assert "4 grids from 0 to 1,000,000 kimg, 264x312 px" in capsys.readouterr().out
    assert {"config.json", "samples", out} == set(os.listdir(run))


def test_damaged_and_other_grids_are_named_and_passed_over(tmp_path, capsys):
    run = four(tmp_path / "run")
    samples = run / "samples"
    whole = (samples / "fake-000000.064kimg.png").read_bytes()
    (samples / "fake-000000.064kimg.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (34, 36)).save(samples / "fake-000003.000kimg.png")
    (samples / "fake-000004.000kimg.png").write_bytes(b"")
    Image.new("RGB", (66, 70)).save(samples / "real.png")
    assert main(["animate", str(run), "--scale=1"]) == 0
    said = capsys.readouterr()
    assert "warning: fake-000000.064kimg.png cannot be read (" in said.err
    assert "warning: fake-000003.000kimg.png is of 34x36 px, most are of 66x70" in said.err
    assert "warning: fake-000004.000kimg.png cannot be read (" in said.err
    assert len(said.err.splitlines()) == 3 and "3 grids" in said.out
    frames = shown(run / "training.webp")
    for (colour, _, _), place in zip(frames, (0, 2, 3), strict=True):
        assert np.abs(colour - COLOURS[place]).max() < 12


def test_a_pipe_among_the_grids_is_passed_over(tmp_path, capsys):
    run = four(tmp_path / "run")
    os.mkfifo(run / "samples" / "fake-000000.001kimg.png")
    assert main(["animate", str(run), "--out", str(tmp_path / "a.webp")]) == 0
    assert "fake-000000.001kimg.png cannot be read" in capsys.readouterr().err


def test_of_two_sizes_as_common_the_later_one_is_shown(tmp_path, capsys):
    run = a_run(tmp_path / "run", {"000000.000": COLOURS[0], "000001.000": COLOURS[1]})
    for number in (2, 3):
        Image.new("RGB", (40, 40)).save(run / "samples" / f"fake-00000{number}.000kimg.png")
    assert main(["animate", str(run), "--scale=1"]) == 0
    assert "2 grids from 2 to 3 kimg, 40x72 px" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 1])
def test_one_grid_is_no_film(tmp_path, capsys, count):
    grids = {"000000.000": COLOURS[0]} if count else {}
    run = a_run(tmp_path / "run", grids)
    assert main(["animate", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"a film needs two sample grids or more, and samples/ has {count} (fastgan" in said
    assert not (run / "training.webp").exists()


def test_a_grid_that_is_lost_meanwhile_ends_it(tmp_path, capsys, monkeypatch):
    run, read = four(tmp_path / "run"), module._read
    calls = []

    def lost(path):
        calls.append(path)
        return read(path) if len(calls) < 7 else "cannot be read (gone)"

    monkeypatch.setattr(module, "_read", lost)
    assert main(["animate", str(run)]) == 1
    assert "fake-000099.500kimg.png cannot be read (gone)" in capsys.readouterr().err
    assert set(os.listdir(run)) == {"config.json", "samples"}


def test_grids_larger_than_any_film_are_made_smaller(tmp_path, capsys):
    run = a_run(
        tmp_path / "run", dict.fromkeys(("000000.000", "000001.000"), COLOURS[0]), (9000, 90)
    )
    assert main(["animate", str(run)]) == 0
    assert "4,064x72 px, made smaller from 9,000x90" in capsys.readouterr().out


def test_what_is_no_run(tmp_path, capsys):
    assert main(["animate", str(tmp_path / "none")]) == 2
    assert "RUN must be a run folder" in capsys.readouterr().err
    run = four(tmp_path / "run")
    assert main(["animate", str(run), "--out", str(tmp_path / "a.png")]) == 2
    assert "--out must end in .webp, .gif, .mp4" in capsys.readouterr().err
    assert main(["animate", str(run), "--hold=-1"]) == 2
    assert "--hold must be greater than or equal to 0" in capsys.readouterr().err
