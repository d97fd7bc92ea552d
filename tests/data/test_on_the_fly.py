"""Batches decoded while training: the cache's pixels, and stand-ins for what cannot be decoded."""

import json
import os

import numpy as np
import pytest
from test_decode import encode, picture

from fastgan.config import DataOptions
from fastgan.data import pool, process
from fastgan.data.on_the_fly import OnTheFly
from fastgan.data.prepare import prepare
from fastgan.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02d}.png").write_bytes(encode(picture(20 + i % 3, 24, i)))
    return folder


def by(**options):
    return DataOptions(**{"size": 16, "decoder": "pillow", **options})


def batches(set_, rows, width=5):
    parts = [np.array(rows[at : at + width]) for at in range(0, len(rows), width)]
    return np.concatenate(list(set_.fetch(iter(parts))))


def test_its_pictures_are_the_cache_s(folder, tmp_path):
    options = by(holdout=0.3, crop="14x18", filter="cubic")
    cache, set_ = (
        prepare(str(folder), options, out=tmp_path / "cache"),
        OnTheFly(str(folder), options),
    )
    assert (set_.count, set_.identity, set_.size) == (cache.count, cache.identity, 16)
    rows = np.random.default_rng(0).integers(0, set_.count, 40)
    assert np.array_equal(batches(set_, rows), cache.images[rows])
    assert np.array_equal(set_.pictures(rows[:3]), cache.pictures(rows[:3]))
    set_.close()


def test_the_next_sound_image_stands_in_for_a_bad_one(folder, tmp_path, capsys):
    whole = OnTheFly(str(folder), by())
    sound = whole.pictures(np.arange(24))
    whole.close()
    for row in (4, 5, 23):
        (folder / f"{row:02d}.png").write_bytes(b"text")
    instead = [*range(24)]
    instead[4] = instead[5] = 6
    instead[23] = 0
    set_ = OnTheFly(str(folder), by())
    set_.list_refused_in(tmp_path)
    for order in (np.arange(24), np.arange(24)[::-1], np.tile([5, 4, 23, 6], 9)):
        assert np.array_equal(batches(set_, order), sound[[instead[row] for row in order]])
    set_.close()
    said = capsys.readouterr().err
    assert said.startswith("warning: 04.png: not an image: the next image stands in for it; all")
    assert said.count("\n") == 1
    with open(tmp_path / "skipped.jsonl", "r+") as lines:  # and whose list was cut off
        lines.truncate(os.path.getsize(tmp_path / "skipped.jsonl") - 9)
    again = OnTheFly(str(folder), by())  # a resumed run, whose first bad one is another
    again.list_refused_in(tmp_path)
    assert np.array_equal(batches(again, [23, 5]), sound[[0, 6]])
    again.close()
    *whole, _, last = (tmp_path / "skipped.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in (*whole, last)]
    assert [row["name"] for row in rows] == ["04.png", "05.png", "23.png"]
    assert {row["reason"] for row in rows} == {"not an image"}


def test_a_stand_in_that_goes_bad_has_one_itself(folder):
    whole = OnTheFly(str(folder), by())
    sound = whole.pictures(np.arange(24))
    whole.close()
    (folder / "04.png").write_bytes(b"text")
    set_ = OnTheFly(str(folder), by())
    assert np.array_equal(batches(set_, [4, 4]), sound[[5, 5]])
    (folder / "05.png").unlink()
    assert np.array_equal(batches(set_, [4, 5, 3, 4, 5]), sound[[6, 6, 3, 6, 6]])
    assert np.array_equal(batches(set_, [5, 4]), sound[[6, 6]])
    set_.close()


def test_large_batches_are_asked_for_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(pool, "BATCH", 7)
    asked = []
    send = process.DecodeProcess.send
    monkeypatch.setattr(
        process.DecodeProcess,
        "send",
        lambda self, files, s: (asked.append(len(files)), send(self, files, s)),
    )
    set_ = OnTheFly(str(folder), by())
    rows = np.random.default_rng(0).integers(0, 24, 60)
    got = batches(set_, rows, width=20)
    assert np.array_equal(got, np.concatenate([set_.pictures(rows[i : i + 1]) for i in range(60)]))
    assert asked[:9] == [7, 7, 6] * 3
    set_.close()


def test_too_many_bad_ones_or_one_may_end_it(folder):
    for row in range(13):
        (folder / f"{row:02d}.png").write_bytes(b"text")
    set_ = OnTheFly(str(folder), by())
    with pytest.raises(
        UsageError, match="--data: 13 of 24 images in .* are refused, more than half"
    ):
        batches(set_, [*range(24)])
    set_.close()
    strict = OnTheFly(str(folder), by(on_bad="stop"))
    assert batches(strict, [20, 21]).shape == (2, 16, 16, 3)
    with pytest.raises(UsageError, match="--data: 03.png: not an image .--on-bad skip puts others"):
        batches(strict, [20, 3])
    strict.close()


def test_what_cannot_be_decoded_on_the_fly(folder, tmp_path):
    prepare(str(folder), by(), out=tmp_path / "cache")
    for source in ("faces:10", str(tmp_path / "cache")):
        with pytest.raises(UsageError, match="--loader dali needs a folder of images or a .zip"):
            OnTheFly(source, by())
