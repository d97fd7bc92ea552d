"""Caches: what is in them, when they are used again, and what can never happen to them."""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
from odd_files import write_odd_files
from PIL import Image
from test_decode import needs_dali

from fastgan import lock
from fastgan.config import DataOptions
from fastgan.data import build, faces, image_file, place, pool
from fastgan.data.cache import check_cache, open_cache
from fastgan.data.faces import draw_faces
from fastgan.data.prepare import default_root, prepare
from fastgan.data.subset import hold_out, take
from fastgan.errors import RunError, UsageError


def by(size, **options):
    """By Pillow, which starts at once; the cache is the same with every decoder."""
    return DataOptions(**{"size": size, "decoder": "pillow", **options})


def save(path, colour, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (colour, 255 - colour, 7)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        save(tmp_path / "faces" / f"{i}.png", colour=i * 10)
    return tmp_path / "faces"


def colours(images):
    assert (images == images[:, :1, :1]).all()  # each is of one colour
    return images[:, 0, 0, 0].tolist()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# Contents


def test_rows_follow_the_names_and_say_where_they_are_from(folder, tmp_path, capsys):
    (folder / "1.png").write_bytes(b"text")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:50])
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    made = prepare(str(folder), by(8), out=tmp_path / "cache")
    assert made.images.dtype == np.uint8 and colours(made.images) == [0, 20, 40]
    plain = np.load(tmp_path / "cache" / "images.npy", mmap_mode="r")
    assert np.array_equal(plain, made.images)

    info = os.stat(folder / "2.png")
    kept = lines(tmp_path / "cache" / "files.jsonl")
    assert [row["name"] for row in kept] == ["0.png", "2.png", "4.png"]
    assert kept[1] == {
        "name": "2.png",
        "size_bytes": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "sha256": hashlib.sha256((folder / "2.png").read_bytes()).hexdigest(),
    }
    skipped = {row["name"]: row["reason"] for row in lines(tmp_path / "cache" / "skipped.jsonl")}
    assert skipped["1.png"] == "not an image"
    assert skipped["3.png"].startswith("truncated PNG: ")
    assert skipped["gone.png"] == "unreadable: a link that leads to no file"

    meta = json.loads((tmp_path / "cache" / "meta.json").read_text())
    assert meta["format"] == "fastgan-cache" and meta["format_version"] == 2
    assert (meta["count"], meta["held_out"], meta["decoder"]) == (3, 0, "pillow")
    assert meta["options"] == {
        "size": 8,
        "crop": "center",
        "filter": "triangular",
        "min_size": 1,
        "max_pixels": 64_000_000,
        "limit": None,
        "keep": 1.0,
        "holdout": 0.0,
    }
    assert meta["source"] == str(folder)

    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith(f"cache: 3 images of 8 px in {tmp_path / 'cache'} (")
    assert said[-1] == (
        "skipped 3 of 6 files: 1 not an image, 1 truncated PNG, 1 unreadable; "
        f"names in {tmp_path / 'cache' / 'skipped.jsonl'}"
    )


def test_batches_of_any_size_and_many_kinds_of_damage(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pool, "BATCH", 3)
    monkeypatch.setattr(pool, "BATCH_BYTES", 200)  # the files have about 75
    for i in range(10, 40):
        path = save(folder / f"{i}.png", colour=i)
        if i % 6 == 0:
            path.write_bytes(b"")
    (folder / "a.jpg").write_bytes(b"text")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "c.jpg").symlink_to(tmp_path / "nothing")
    with open(folder / "d.jpg", "wb") as file:
        file.truncate(image_file.MAX_FILE_BYTES + 1)
    made = prepare(str(folder), by(8), out=tmp_path / "cache")
    named = [int(row["name"][:-4]) for row in lines(made.path / "files.jsonl")]
    assert colours(made.images) == [name * 10 if name < 5 else name for name in named]
    assert len(named) == 5 + 30 - 5
    assert "skipped 9 of 39 files: 5 empty file, " in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_nothing_decodable_is_an_error_and_leaves_nothing(folder, tmp_path):
    for path in folder.iterdir():
        path.write_bytes(b"text")
    os.rename(folder / "0.png", os.fsencode(folder) + b"/0\xff\n.png")
    with pytest.raises(UsageError) as caught:
        prepare(str(folder), by(8), out=tmp_path / "cache", flag="SOURCE")
    message = str(caught.value)
    assert message.startswith("SOURCE: 3 of 5 images in ") and "not an image" in message
    assert "0\\udcff\\n.png" in message and message.isprintable()
    assert os.listdir(tmp_path) == ["faces"]


def test_drawn_faces(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "FACES_CHUNK", 3)
    options = DataOptions(size=16)
    made = prepare("faces:7", options, root=tmp_path)
    assert made.path == tmp_path / "faces-7-16px"
    assert np.array_equal(made.images, faces.draw_faces(7, 16, seed=0))
    assert made.meta.source == "faces:7"
    prepare("faces:7", options, root=tmp_path)
    assert capsys.readouterr().out.endswith("(reused)\n")
    monkeypatch.setattr(faces, "FACES_VERSION", faces.FACES_VERSION + 1)
    prepare("faces:7", options, root=tmp_path)
    assert f"rebuilding {made.path}: the drawing code changed\n" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["faces:", "faces:0", "faces:-1", "faces:1.5", "faces:٣"])
def test_malformed_faces(source, tmp_path):
    with pytest.raises(UsageError, match=f"--data: faces:N needs .* got {source}"):
        prepare(source, DataOptions(size=16), root=tmp_path)


def test_the_decoder_is_chosen_for_the_set(folder, tmp_path, capfd):
    """PNGs are Pillow's on any machine."""
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    made = prepare(str(folder), DataOptions(size=8), out=tmp_path / "cache")
    assert colours(made.images) == [0, 20, 30, 40] and made.meta.decoder == "pillow"
    said = capfd.readouterr()
    assert "decoding with pillow" in said.out
    assert "skipped 1 of 5 files: 1 truncated PNG" in said.out and "png" not in said.err


@needs_dali
def test_a_decoder_that_is_named_decodes_anew_and_auto_keeps_what_it_made(folder, tmp_path, capfd):
    made = prepare(str(folder), DataOptions(size=8), out=tmp_path / "cache")
    other = by(8, decoder="dali-cpu")
    assert prepare(str(folder), other, out=made.path).meta.decoder == "dali-cpu"
    rebuilt = f"rebuilding {made.path}: it was decoded by pillow, not dali-cpu"
    assert rebuilt in capfd.readouterr().out
    assert prepare(str(folder), DataOptions(size=8), out=made.path).meta.decoder == "dali-cpu"


# Refused


def test_a_bad_file_may_stop_the_build(folder, tmp_path):
    (folder / "3.png").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"^--data: 3.png: not an image \(--on-bad skip leaves"):
        prepare(str(folder), by(8, on_bad="stop"), out=tmp_path / "cache")
    assert os.listdir(tmp_path) == ["faces"]


def test_what_was_skipped_before_stops_who_asks_for_it(folder, tmp_path):
    (folder / "3.png").write_bytes(b"text")
    path = prepare(str(folder), by(8), out=tmp_path / "cache").path
    for source, out in ((folder, path), (path, None)):
        with pytest.raises(UsageError, match="--on-bad stop: 1 files of .*, as 3.png: not an im"):
            prepare(str(source), by(8, on_bad="stop"), out=out)


@pytest.mark.parametrize("bad", [2, 3])
def test_more_than_half_refused_stops_the_build(bad, folder, tmp_path):
    for i in range(bad):
        save(folder / f"{i}.png", 9, size=7)
    if bad == 2:
        assert prepare(str(folder), by(8, min_size=8), out=tmp_path / "cache").count == 3
        return
    with pytest.raises(UsageError) as caught:
        prepare(str(folder), by(8, min_size=8), out=tmp_path / "cache")
    assert str(caught.value) == (
        f"--data: 3 of 5 images in {folder} are refused, more than half (3 too small): "
        "0.png: too small: 7x7 is under 8 pixels (--min-size); "
        "1.png: too small: 7x7 is under 8 pixels (--min-size); "
        "2.png: too small: 7x7 is under 8 pixels (--min-size)"
    )
    assert os.listdir(tmp_path) == ["faces"]


def test_what_is_enlarged_is_said(folder, tmp_path, capsys):
    save(folder / "1.png", 10, size=40)
    prepare(str(folder), by(32), out=tmp_path / "cache")
    said = capsys.readouterr().out
    assert "enlarged 4 images of fewer than 32 pixels a side (--min-size 32 would refuse" in said


def test_the_account_of_a_folder_of_odd_files_is_true(tmp_path, capfd):
    (tmp_path / "odd").mkdir()
    odd = write_odd_files(tmp_path / "odd")
    made = prepare(str(tmp_path / "odd"), DataOptions(size=32), out=tmp_path / "cache")
    taken = {row["name"] for row in lines(made.path / "files.jsonl")}
    skipped = {row["name"]: row["reason"] for row in lines(made.path / "skipped.jsonl")}
    assert taken == {file.name for file in odd if file.pixels is not None}
    wrong = [file.name for file in odd if file.pixels is None]
    assert skipped.keys() == set(wrong) and made.count == len(taken)
    said = capfd.readouterr()
    assert f"skipped {len(wrong)} of {len(odd)} files: " in said.out
    assert "6 not an image, 5 truncated PNG, 4 too large, 27 other" in said.out
    assert said.err == ""
    check_cache(made.path)


# Chosen


def test_a_part_is_held_out_and_lies_at_the_end(folder, tmp_path, capsys):
    for i in range(5, 25):
        save(folder / f"{i}.png", i * 10)
    (folder / "7.png").write_bytes(b"text")
    made = prepare(str(folder), by(8, holdout=0.4), out=tmp_path / "cache")
    names = [int(row["name"][:-4]) for row in lines(made.path / "files.jsonl")]
    assert colours(made.images) + colours(made.held_out) == [name * 10 for name in names]
    assert made.count == 24 - made.meta.held_out and 3 < made.meta.held_out < 17
    parts = names[: made.count], names[made.count :]
    assert [sorted(part, key=str) for part in parts] == [*parts]
    assert f"cache: {made.count} images of 8 px and {len(parts[1])} held out" in (
        capsys.readouterr().out
    )
    apart = hold_out([f"{name}.png" for name in names], 0.4)
    assert apart == [False] * made.count + [True] * len(parts[1])
    whole = prepare(str(folder), by(8), out=tmp_path / "whole")
    assert whole.count == 24 and len(whole.held_out) == 0


def test_every_choice_has_a_cache_of_its_own(folder, tmp_path):
    for i in range(5, 40):
        save(folder / f"{i}.png", i * 6)
    choices = [{}, {"keep": 0.5}, {"limit": 9}, {"holdout": 0.5}, {"crop": "9x9"}, {"min_size": 9}]
    choices += [{"filter": "cubic"}, {"max_pixels": 999}]
    made = [prepare(str(folder), by(8, **choice), root=tmp_path / "root") for choice in choices]
    assert len({cache.path for cache in made}) == len(choices)
    assert len({cache.identity for cache in made}) == len(choices)
    assert made[2].count == 9 and 10 < made[1].count < 30
    assert set(colours(made[2].images)) < set(colours(made[0].images))
    faces = [
        prepare("faces:40", DataOptions(size=16, **choice), root=tmp_path / "root")
        for choice in choices[:4]
    ]
    drawn = draw_faces(40, 16)
    for cache, choice in zip(faces, choices, strict=False):
        numbers = take([str(i) for i in range(40)], choice.get("limit"), choice.get("keep", 1.0))
        apart = hold_out([str(i) for i in numbers], choice.get("holdout", 0.0))
        assert np.array_equal(
            cache.images, drawn[[n for n, a in zip(numbers, apart, strict=True) if not a]]
        )
        assert np.array_equal(
            cache.held_out, drawn[[n for n, a in zip(numbers, apart, strict=True) if a]]
        )


@pytest.mark.parametrize("choice", [{"keep": 1e-9}, {"holdout": 1 - 1e-9}])
def test_choices_that_leave_nothing(choice, folder, tmp_path):
    for source in (str(folder), "faces:5"):
        with pytest.raises(
            UsageError, match="--data: no image of .* is left to train on by --keep"
        ):
            prepare(source, DataOptions(size=8, **choice), root=tmp_path)


def test_options_that_say_nothing_of_drawn_faces(tmp_path):
    for choice in ({"crop": "none"}, {"filter": "cubic"}, {"min_size": 9}, {"decoder": "pillow"}):
        with pytest.raises(UsageError, match="--.* does not apply to drawn faces"):
            prepare("faces:5", DataOptions(size=16, **choice), root=tmp_path)


def test_a_zip_gives_the_set_of_its_folder(folder, tmp_path):
    for i in range(5, 30):
        save(folder / "in" / f"{i}.png", i * 8)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(folder))
    options = by(8, keep=0.8, holdout=0.2)
    by_folder = prepare(str(folder), options, out=tmp_path / "a")
    by_zip = prepare(str(tmp_path / "faces.zip"), options, out=tmp_path / "b")
    assert np.array_equal(by_folder.images, by_zip.images)
    assert np.array_equal(by_folder.held_out, by_zip.held_out)
    rows = [lines(cache.path / "files.jsonl") for cache in (by_folder, by_zip)]
    assert [row["sha256"] for row in rows[0]] == [row["sha256"] for row in rows[1]]
    reused = prepare(str(tmp_path / "faces.zip"), options, out=tmp_path / "b", verify=True)
    assert reused.meta.created == by_zip.meta.created


# Checked


def test_a_check_reads_everything(folder, tmp_path):
    path = prepare(str(folder), by(8), out=tmp_path / "cache").path
    assert check_cache(path).count == 5
    for name in ("images.npy", "files.jsonl", "meta.json"):
        content = (path / name).read_bytes()
        if name == "meta.json":
            (path / name).write_bytes(content.replace(b'"keep": 1.0', b'"keep": 0.5'))
        else:
            (path / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        with pytest.raises(RunError, match=f"{name} is not what was written: its SHA-256"):
            check_cache(path)
        (path / name).write_bytes(content)
    assert check_cache(path).count == 5
    assert check_cache(prepare("faces:3", DataOptions(size=16), root=tmp_path).path).count == 3


def test_verify_reads_the_files_again(folder, tmp_path, capsys):
    path = tmp_path / "cache"
    (folder / "4.png").unlink()
    (folder / "4.png").symlink_to(tmp_path / "nothing")
    prepare(str(folder), by(8), out=path)
    file = folder / "2.png"
    info, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + b"!")  # of the same length, and by its time the same
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    prepare(str(folder), by(8), out=path)
    assert capsys.readouterr().out.endswith("(reused, without 1 that were skipped)\n")
    prepare(str(folder), by(8), out=path, verify=True)
    assert f"rebuilding {path}: the contents of '2.png' changed\n" in capsys.readouterr().out
    prepare(str(folder), by(8), out=path, verify=True)
    assert capsys.readouterr().out.endswith("(reused, without 1 that were skipped)\n")


# Used again, or built anew


def test_an_unchanged_folder_is_not_decoded_again(folder, tmp_path, monkeypatch, capsys):
    first = prepare(str(folder), by(8), root=tmp_path / "root")
    monkeypatch.setattr(build, "open_pool", None)
    monkeypatch.chdir(folder)
    again = prepare(".", by(8), root=tmp_path / "root")
    assert again.path == first.path and colours(again.images) == colours(first.images)
    assert capsys.readouterr().out.endswith(f"cache: 5 images of 8 px in {first.path} (reused)\n")


def damage_array(path, **_):
    os.truncate(path / "images.npy", 500)


def other_meta(**changes):
    def change(path, **_):
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


def other_options(**changes):
    def change(path, **_):
        meta = json.loads((path / "meta.json").read_text())
        meta = {**meta, "fingerprint": "0", "options": {**meta["options"], **changes}}
        (path / "meta.json").write_text(json.dumps(meta))

    return change


def edit_files(path, folder):
    save(folder / "9.png", 90)
    save(folder / "8.png", 80)
    save(folder / "2.png", 222, size=17)
    (folder / "0.png").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_files, "2 files added, 1 changed, 1 removed"),
        (lambda path, folder: save(folder / "9.png", 90), "1 file added"),
        (lambda path, folder: os.utime(folder / "2.png", ns=(0, 0)), "1 file changed"),
        (damage_array, "the cache is damaged: images.npy has 500 bytes where 1,088 belong"),
        (lambda path, folder: (path / "meta.json").write_text('{"form'), "damaged: JSONDecodeErr"),
        (lambda path, folder: (path / "images.npy").unlink(), "the cache is damaged: FileNotFound"),
        (other_meta(count=6), "the cache is damaged: images.npy has 1,088 bytes"),
        (other_meta(format_version=1), "the cache is damaged: its format is version 1, not 2"),
        (other_meta(held_out=True), "the cache is damaged: meta.json: held_out: Input should be"),
        (other_meta(held_out=5), "the cache is damaged: meta.json counts 5 held out of 5 images"),
        (other_meta(source=5), "the cache is damaged: meta.json: source: Input should be"),
        (other_meta(sha256=None), "the cache is damaged: meta.json: sha256: Input should be"),
        (other_options(size="8"), "the cache is damaged: meta.json: size: Input should be"),
        (lambda path, folder: (path / "files.jsonl").unlink(), "damaged: FileNotFoundError"),
        (other_options(crop="5x5"), "--crop is center now, was 5x5"),
        (other_meta(fingerprint="0"), "its fingerprint does not fit its files"),
    ],
)
def test_what_does_not_fit_is_built_anew_with_the_reason(change, reason, folder, tmp_path, capsys):
    path = tmp_path / "cache"
    prepare(str(folder), by(8), out=path)
    change(path=path, folder=folder)
    capsys.readouterr()
    rebuilt = prepare(str(folder), by(8), out=path)
    said = capsys.readouterr().out
    assert said.startswith(f"rebuilding {path}: ") and reason in said
    expected = [10 * int(p.stem) for p in sorted(folder.iterdir())]
    if change is edit_files:
        expected[1] = 222
    assert colours(rebuilt.images) == expected
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]  # nothing is left of the old one
    prepare(str(folder), by(8), out=path)
    assert "(reused)" in capsys.readouterr().out


def test_a_cache_of_a_newer_fastgan_is_left_alone(folder, tmp_path):
    path = tmp_path / "cache"
    prepare(str(folder), by(8), out=path)
    other_meta(format_version=9)(path)
    before = tree(path)
    for arguments in ({"source": str(folder), "out": path}, {"source": str(path)}):
        with pytest.raises(UsageError, match=r"of a newer fastgan \(format 9, this one knows 2\)"):
            prepare(options=by(8), **arguments)
    assert tree(path) == before


@pytest.mark.parametrize("content", ["brackets", "a link to /dev/zero", "a pipe", "long"])
def test_a_source_with_a_strange_meta_json(content, folder, tmp_path):
    place = folder / "meta.json"
    if content == "a pipe":
        os.mkfifo(place)
    elif content == "a link to /dev/zero":
        place.symlink_to("/dev/zero")
    elif content == "long":
        with open(place, "wb") as file:
            file.truncate(60 << 30)
    else:
        place.write_text("[" * 200_000)
    assert prepare(str(folder), by(8), out=tmp_path / "cache").count == 5


def test_a_file_that_becomes_readable_is_taken(folder, tmp_path, capsys):
    path = tmp_path / "cache"
    (folder / "9.png").symlink_to(tmp_path / "elsewhere" / "9.png")
    prepare(str(folder), by(8), out=path)
    prepare(str(folder), by(8), out=path)
    assert capsys.readouterr().out.endswith("(reused, without 1 that were skipped)\n")
    row = json.loads((path / "skipped.jsonl").read_text())
    row["name"] = "2.png"  # as one that was not to be read for a while, with its times
    meta = json.loads((path / "meta.json").read_text())
    (path / "skipped.jsonl").write_text(
        json.dumps(row | {"reason": "unreadable: I/O error"}) + "\n"
    )
    assert meta["count"] == 5
    prepare(str(folder), by(8), out=path)
    assert f"rebuilding {path}: '2.png' can be read now\n" in capsys.readouterr().out


def test_what_comes_into_its_place_meanwhile_is_not_replaced(folder, tmp_path, monkeypatch):
    path, run = tmp_path / "cache", pool.DecodePool.run

    def meanwhile(self, batches):
        yield from run(self, batches)
        path.mkdir()
        (path / "images.npy").write_text("precious")

    monkeypatch.setattr(pool.DecodePool, "run", meanwhile)
    with pytest.raises(UsageError, match="must be a new folder, an empty one or a cache"):
        prepare(str(folder), by(8), out=path)
    assert tree(path) == {"images.npy": b"precious"}
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]


def test_another_size_or_source_in_its_place(folder, tmp_path, capsys):
    path = tmp_path / "cache"
    prepare(str(folder), by(8), out=path)
    assert prepare(str(folder), by(4), out=path).images.shape == (5, 4, 4, 3)
    assert "it holds images of 8 px, not 4" in capsys.readouterr().out
    save(tmp_path / "other" / "a.png", 77)
    assert colours(prepare(str(tmp_path / "other"), by(4), out=path).images) == [77]
    assert f"it was made from {folder}" in capsys.readouterr().out


def test_a_moved_folder_keeps_its_cache(folder, tmp_path, capsys):
    prepare(str(folder), by(8), out=tmp_path / "cache")
    folder.rename(tmp_path / "moved")
    prepare(str(tmp_path / "moved"), by(8), out=tmp_path / "cache")
    assert capsys.readouterr().out.endswith("(reused)\n")


def test_an_open_cache_outlives_its_replacement(folder, tmp_path):
    old = prepare(str(folder), by(8), out=tmp_path / "cache")
    (folder / "0.png").unlink()
    new = prepare(str(folder), by(8), out=tmp_path / "cache")
    assert colours(old.images) == [0, 10, 20, 30, 40] and colours(new.images) == [10, 20, 30, 40]
    with pytest.raises(ValueError, match="read-only"):
        new.images[0] = 0


# Where


def test_the_usual_place(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTGAN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / "home" / ".cache" / "fastgan"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root() == tmp_path / "xdg" / "fastgan"
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "own"))
    named = folder.rename(tmp_path / "Größe & co")
    first = prepare(str(named), by(8))
    assert first.path.parent == tmp_path / "own"
    stem, size, digest = first.path.name.rsplit("-", 2)
    assert (stem, size, len(digest)) == ("gr-e-co", "8px", 8)
    twin = tmp_path / "x" / named.name
    save(twin / "a.png", 1)
    assert prepare(str(twin), by(8)).path.name != first.path.name


def test_a_cache_as_the_source(folder, tmp_path, capsys):
    path = tmp_path / "cache"
    prepare(str(folder), by(8), out=path)
    before = tree(path)
    assert colours(prepare(str(path), by(8)).images) == [0, 10, 20, 30, 40]
    assert capsys.readouterr().out.endswith(f"cache: 5 images of 8 px in {path}\n")
    with pytest.raises(UsageError, match=r"--data: .* holds images of 8 px, but --size is 16"):
        prepare(str(path), by(16))
    with pytest.raises(UsageError, match="--out cannot be used here"):
        prepare(str(path), by(8), out=tmp_path / "other")
    assert tree(path) == before
    os.truncate(path / "images.npy", 500)
    with pytest.raises(RunError, match=r"images.npy has 500 bytes .* delete it and run"):
        prepare(str(path), by(8))
    with pytest.raises(UsageError, match="--real: .* is not a cache"):
        open_cache(folder, "--real")


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["images.npy"],
        ["images.npy", "meta.json"],
        ["sub/notes.txt"],
        [".hidden"],
    ],
)
def test_a_user_s_folder_is_never_touched(names, folder, tmp_path):
    own = tmp_path / "own"
    for name in names:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text('{"format": "mine"}')
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="--out must be a new folder, an empty one or a cache"):
        prepare(str(folder), by(8), out=own)
    assert tree(tmp_path) == before


def test_a_file_laid_into_a_cache_keeps_it_from_being_replaced(folder, tmp_path):
    path = tmp_path / "cache"
    prepare(str(folder), by(8), out=path)
    (path / "notes.txt").write_text("mine")
    (folder / "0.png").unlink()
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="notes.txt"):
        prepare(str(folder), by(8), out=path)
    assert tree(tmp_path) == before


def test_places_that_cannot_be_written(folder, tmp_path, monkeypatch):
    file = save(tmp_path / "file.png", 1)
    with pytest.raises(UsageError, match=r"--out must be a folder .* is a file"):
        prepare(str(folder), by(8), out=file)
    with pytest.raises(UsageError, match="--cache: cannot make the cache .*file.png is a file"):
        prepare(str(folder), by(8), root=file / "below")
    with pytest.raises(UsageError, match="--cache: cannot write the cache /proc/"):
        prepare(str(folder), by(8), root=Path("/proc/nowhere"))
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    assert colours(prepare(str(folder), by(8), out=link).images) == [0, 10, 20, 30, 40]
    assert link.is_symlink() and (empty / "meta.json").is_file()


# Interrupted


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), ZeroDivisionError(), OSError(28, "full")])
def test_an_interrupted_build_leaves_nothing_and_the_old_cache(
    fault, folder, tmp_path, monkeypatch
):
    path = tmp_path / "cache"
    prepare(str(folder), by(8), out=path)
    before = tree(path)
    save(folder / "9.png", 90)
    monkeypatch.setattr(pool, "BATCH", 2)
    run = pool.DecodePool.run

    def fail_in_the_middle(self, batches):
        for decoded in run(self, batches):
            if len(list(tmp_path.glob(".cache.building-*"))) == 1 and len(seen) == 2:
                raise fault
            seen.append(decoded)
            yield decoded

    seen: list = []
    with monkeypatch.context() as patch:
        patch.setattr(pool.DecodePool, "run", fail_in_the_middle)
        expected = RunError if isinstance(fault, OSError) else type(fault)
        with pytest.raises(expected) as caught:
            prepare(str(folder), by(8), out=path)
    if isinstance(fault, OSError):
        assert "no room" in str(caught.value) and "--out" in str(caught.value)
    assert len(seen) == 2 and tree(path) == before
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]
    assert colours(prepare(str(folder), by(8), out=path).images)[-1] == 90


BUILD = """
    import sys
    from pathlib import Path
    from fastgan import lock
    from fastgan.config import DataOptions
    from fastgan.data import pool
    from fastgan.data.prepare import prepare
    if "no locks" in sys.argv:
        lock.fcntl = None
    pool.BATCH = 1
    run = pool.DecodePool.run
    def when_told(self, batches):
        for decoded in run(self, batches):
            print("ready", flush=True)
            sys.stdin.readline()
            yield decoded
    pool.DecodePool.run = when_told
    prepare(sys.argv[1], DataOptions(size=8, decoder="pillow"), out=Path(sys.argv[2]))
"""


def start_build(folder, path, *more):
    """A process that waits before each file for a line on its stdin; its end lets it run freely."""
    arguments = [sys.executable, "-c", textwrap.dedent(BUILD), str(folder), str(path), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True)


def wait_ready(child):
    while "ready" not in child.stdout.readline():
        assert child.poll() is None


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_build_is_swept_by_the_next(locks, folder, tmp_path, monkeypatch):
    if not locks:
        monkeypatch.setattr(lock, "fcntl", None)
    path = tmp_path / "cache"
    with start_build(folder, path) as child:
        wait_ready(child)
        child.stdin.write("\n")
        child.stdin.flush()
        wait_ready(child)  # the second file is under way
        child.send_signal(signal.SIGKILL)
    host = socket.gethostname()
    left = f".cache.building-{host}-{child.pid}"
    assert left in os.listdir(tmp_path) and not path.exists()
    elsewhere = tmp_path / f".cache.building-elsewhere-{child.pid}"
    alive = tmp_path / f".cache.building-{host}-{os.getppid()}"
    for other in (elsewhere, alive):
        other.mkdir()
    made = prepare(str(folder), by(8), out=path)
    assert colours(made.images) == [0, 10, 20, 30, 40]
    left = {elsewhere.name} if locks else {elsewhere.name, alive.name}  # it cannot be at it
    assert set(os.listdir(tmp_path)) == {"cache", "faces", *left}


def test_who_comes_second_waits_and_uses_the_first_one_s(folder, tmp_path):
    path = tmp_path / "cache"
    first = start_build(folder, path)
    wait_ready(first)
    others = [start_build(folder, path) for _ in range(2)]
    for child in others:
        assert child.stdout.readline() == f"waiting for another process, which builds {path}\n"
    assert len(list(tmp_path.glob(".cache.building-*"))) == 1
    for child in (first, *others):
        child.stdin.close()
    assert "img/s, pillow" in first.stdout.read() and first.wait() == 0
    for child in others:
        assert child.stdout.read() == f"cache: 5 images of 8 px in {path} (reused)\n"
        assert child.wait() == 0
    for child in (first, *others):
        child.stdout.close()
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]


def test_who_waits_builds_when_the_first_is_killed(folder, tmp_path):
    path = tmp_path / "cache"
    first = start_build(folder, path)
    wait_ready(first)
    with start_build(folder, path) as second:
        assert "waiting" in second.stdout.readline()
        first.kill()
        wait_ready(second)
        second.stdin.close()
        assert second.wait() == 0
    first.wait()
    first.stdin.close()
    first.stdout.close()
    assert colours(open_cache(path).images) == [0, 10, 20, 30, 40]
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]


def test_two_processes_build_the_same_cache_at_once_without_locks(folder, tmp_path):
    path = tmp_path / "cache"
    builds = [start_build(folder, path, "no locks") for _ in range(2)]
    for child in builds:
        wait_ready(child)
    assert len(list(tmp_path.glob(".cache.building-*"))) == 2
    for child in builds:
        child.stdin.close()
    for child in builds:
        assert "cache: 5 images of 8 px" in child.stdout.read()
        assert child.wait() == 0
        child.stdout.close()
    assert colours(open_cache(path).images) == [0, 10, 20, 30, 40]
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]


TRIALS = 5


def install(buildings, path, fingerprint, barrier):
    for building in buildings:
        barrier.wait(60)  # all start at once
        place.install(building, path, fingerprint, None)
        barrier.wait(60)  # the parent looks
        barrier.wait(60)


def test_many_finish_at_the_same_moment(folder, tmp_path):
    """Four of two kinds want the same place: whatever the order, a whole one is there."""
    made, path = prepare(str(folder), by(8), out=tmp_path / "made"), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(5)
    workers = []
    for number, fingerprint in enumerate(("a", "b", "a", "b")):
        buildings = [tmp_path / f".building-{trial}-{number}" for trial in range(TRIALS)]
        for building in buildings:
            building.mkdir()
            for name, content in tree(made.path).items():
                (building / name).write_bytes(content)
            other_meta(fingerprint=fingerprint)(building)
        arguments = (buildings, path, fingerprint, barrier)
        workers.append(context.Process(target=install, args=arguments, daemon=True))
    for worker in workers:
        worker.start()
    for _ in range(TRIALS):
        barrier.wait(60)
        barrier.wait(60)
        assert open_cache(path).meta.fingerprint in ("a", "b")
        assert colours(open_cache(path).images) == [0, 10, 20, 30, 40]
        assert not list(tmp_path.glob(".cache.old-*"))
        barrier.wait(60)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
