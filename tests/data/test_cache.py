"""Caches: what is in them, when they are used again, and what can never happen to them."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.data import build, decode, faces
from fastgan.data.cache import open_cache
from fastgan.data.prepare import default_root, prepare
from fastgan.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def by_pillow(monkeypatch):
    """The cache is the same with every decoder; Pillow starts at once."""
    monkeypatch.setattr(build, "open_decoder", lambda size: decode.open_decoder(size, "pillow"))


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
    made = prepare(str(folder), 8, out=tmp_path / "cache")
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
    }
    skipped = {row["name"]: row["reason"] for row in lines(tmp_path / "cache" / "skipped.jsonl")}
    assert skipped["1.png"] == "not an image"
    assert skipped["3.png"].startswith("truncated PNG: ")
    assert skipped["gone.png"] == "unreadable: No such file or directory"

    meta = json.loads((tmp_path / "cache" / "meta.json").read_text())
    assert meta["format"] == "fastgan-cache" and meta["format_version"] == 1
    assert (meta["size"], meta["count"], meta["decoder"]) == (8, 3, "pillow")
    assert (meta["crop"], meta["filter"]) == ("center", "triangular")
    assert meta["source"] == str(folder)

    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith(f"cache: 3 images of 8 px in {tmp_path / 'cache'} (")
    assert said[-1] == (
        "skipped 3 of 6 files: 1 not an image, 1 truncated PNG, 1 unreadable; "
        f"names in {tmp_path / 'cache' / 'skipped.jsonl'}"
    )


def test_batches_of_any_size_and_many_kinds_of_damage(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 3)
    monkeypatch.setattr(build, "BATCH_BYTES", 200)  # the files have about 75
    for i in range(10, 40):
        path = save(folder / f"{i}.png", colour=i)
        if i % 6 == 0:
            path.write_bytes(b"")
    (folder / "a.jpg").write_bytes(b"text")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "c.jpg").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(build, "MAX_FILE_BYTES", 1000)
    (folder / "d.jpg").write_bytes(bytes(1001))
    made = prepare(str(folder), 8, out=tmp_path / "cache")
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
        prepare(str(folder), 8, out=tmp_path / "cache", flag="SOURCE")
    message = str(caught.value)
    assert message.startswith("SOURCE: none of the 5 images") and "not an image" in message
    assert "0\\udcff\\n.png" in message and message.isprintable()
    assert os.listdir(tmp_path) == ["faces"]


def test_drawn_faces(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "FACES_CHUNK", 3)
    made = prepare("faces:7", 16, root=tmp_path)
    assert made.path == tmp_path / "faces-7-16px"
    assert np.array_equal(made.images, faces.draw_faces(7, 16, seed=0))
    assert made.meta.source == "faces:7"
    prepare("faces:7", 16, root=tmp_path)
    assert capsys.readouterr().out.endswith("(reused)\n")
    monkeypatch.setattr(faces, "FACES_VERSION", faces.FACES_VERSION + 1)
    prepare("faces:7", 16, root=tmp_path)
    assert f"rebuilding {made.path}: the drawing code changed\n" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["faces:", "faces:0", "faces:-1", "faces:1.5", "faces:٣"])
def test_malformed_faces(source, tmp_path):
    with pytest.raises(UsageError, match=f"--data: faces:N needs .* got {source}"):
        prepare(source, 16, root=tmp_path)


def test_the_decoder_chosen_for_this_machine(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(build, "open_decoder", decode.open_decoder)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    made = prepare(str(folder), 8, out=tmp_path / "cache")
    assert colours(made.images) == [0, 20, 30, 40]
    chosen = decode.open_decoder(8)
    said = capfd.readouterr()
    assert made.meta.decoder == chosen.name
    assert f"decoding with {chosen.name}" in said.out + said.err
    assert "skipped 1 of 5 files: 1 truncated PNG" in said.out and "png" not in said.err


# Used again, or built anew


def test_an_unchanged_folder_is_not_decoded_again(folder, tmp_path, monkeypatch, capsys):
    first = prepare(str(folder), 8, root=tmp_path / "root")
    monkeypatch.setattr(build, "open_decoder", None)
    monkeypatch.chdir(folder)
    again = prepare(".", 8, root=tmp_path / "root")
    assert again.path == first.path and colours(again.images) == colours(first.images)
    assert capsys.readouterr().out.endswith(f"cache: 5 images of 8 px in {first.path} (reused)\n")


def damage_array(path, **_):
    os.truncate(path / "images.npy", 500)


def other_meta(**changes):
    def change(path, **_):
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps({**meta, **changes}))

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
        (other_meta(format_version=9), "the cache is damaged: its format is version 9"),
        (other_meta(crop="left", fingerprint="0"), "the crop is center now, was left"),
        (other_meta(fingerprint="0"), "its fingerprint does not fit its files"),
    ],
)
def test_what_does_not_fit_is_built_anew_with_the_reason(change, reason, folder, tmp_path, capsys):
    path = tmp_path / "cache"
    prepare(str(folder), 8, out=path)
    change(path=path, folder=folder)
    capsys.readouterr()
    rebuilt = prepare(str(folder), 8, out=path)
    said = capsys.readouterr().out
    assert said.startswith(f"rebuilding {path}: ") and reason in said
    expected = [10 * int(p.stem) for p in sorted(folder.iterdir())]
    if change is edit_files:
        expected[1] = 222
    assert colours(rebuilt.images) == expected
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]  # nothing is left of the old one
    prepare(str(folder), 8, out=path)
    assert "(reused)" in capsys.readouterr().out


def test_another_size_or_source_in_its_place(folder, tmp_path, capsys):
    path = tmp_path / "cache"
    prepare(str(folder), 8, out=path)
    assert prepare(str(folder), 4, out=path).images.shape == (5, 4, 4, 3)
    assert "it holds images of 8 px, not 4" in capsys.readouterr().out
    save(tmp_path / "other" / "a.png", 77)
    assert colours(prepare(str(tmp_path / "other"), 4, out=path).images) == [77]
    assert f"it was made from {folder}" in capsys.readouterr().out


def test_a_moved_folder_keeps_its_cache(folder, tmp_path, capsys):
    prepare(str(folder), 8, out=tmp_path / "cache")
    folder.rename(tmp_path / "moved")
    prepare(str(tmp_path / "moved"), 8, out=tmp_path / "cache")
    assert capsys.readouterr().out.endswith("(reused)\n")


def test_an_open_cache_outlives_its_replacement(folder, tmp_path):
    old = prepare(str(folder), 8, out=tmp_path / "cache")
    (folder / "0.png").unlink()
    new = prepare(str(folder), 8, out=tmp_path / "cache")
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
    first = prepare(str(named), 8)
    assert first.path.parent == tmp_path / "own"
    stem, size, digest = first.path.name.rsplit("-", 2)
    assert (stem, size, len(digest)) == ("gr-e-co", "8px", 8)
    twin = tmp_path / "x" / named.name
    save(twin / "a.png", 1)
    assert prepare(str(twin), 8).path.name != first.path.name


def test_a_cache_as_the_source(folder, tmp_path, capsys):
    path = tmp_path / "cache"
    prepare(str(folder), 8, out=path)
    before = tree(path)
    assert colours(prepare(str(path), 8).images) == [0, 10, 20, 30, 40]
    assert capsys.readouterr().out.endswith(f"cache: 5 images of 8 px in {path}\n")
    with pytest.raises(UsageError, match=r"--data: .* holds images of 8 px, but --size is 16"):
        prepare(str(path), 16)
    with pytest.raises(UsageError, match="--out cannot be used here"):
        prepare(str(path), 8, out=tmp_path / "other")
    assert tree(path) == before
    os.truncate(path / "images.npy", 500)
    with pytest.raises(RunError, match=r"images.npy has 500 bytes .* delete it and run"):
        prepare(str(path), 8)
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
        prepare(str(folder), 8, out=own)
    assert tree(tmp_path) == before


def test_a_file_laid_into_a_cache_keeps_it_from_being_replaced(folder, tmp_path):
    path = tmp_path / "cache"
    prepare(str(folder), 8, out=path)
    (path / "notes.txt").write_text("mine")
    (folder / "0.png").unlink()
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="notes.txt"):
        prepare(str(folder), 8, out=path)
    assert tree(tmp_path) == before


def test_places_that_cannot_be_written(folder, tmp_path, monkeypatch):
    file = save(tmp_path / "file.png", 1)
    with pytest.raises(UsageError, match=r"--out must be a folder .* is a file"):
        prepare(str(folder), 8, out=file)
    with pytest.raises(UsageError, match="--cache: cannot make the cache .*file.png is a file"):
        prepare(str(folder), 8, root=file / "below")
    with pytest.raises(UsageError, match="--cache: cannot write the cache /proc/"):
        prepare(str(folder), 8, root=Path("/proc/nowhere"))
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    assert colours(prepare(str(folder), 8, out=link).images) == [0, 10, 20, 30, 40]
    assert link.is_symlink() and (empty / "meta.json").is_file()


# Interrupted


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), ZeroDivisionError(), OSError(28, "full")])
def test_an_interrupted_build_leaves_nothing_and_the_old_cache(
    fault, folder, tmp_path, monkeypatch
):
    path = tmp_path / "cache"
    prepare(str(folder), 8, out=path)
    before = tree(path)
    save(folder / "9.png", 90)
    monkeypatch.setattr(build, "BATCH", 2)
    decoded = decode.PillowDecoder.decode

    def fail_in_the_middle(self, blobs):
        if len(list(tmp_path.glob(".cache.building-*"))) == 1 and len(seen) == 2:
            raise fault
        seen.append(blobs)
        return decoded(self, blobs)

    seen: list = []
    with monkeypatch.context() as patch:
        patch.setattr(decode.PillowDecoder, "decode", fail_in_the_middle)
        expected = RunError if isinstance(fault, OSError) else type(fault)
        with pytest.raises(expected) as caught:
            prepare(str(folder), 8, out=path)
    if isinstance(fault, OSError):
        assert "no room" in str(caught.value) and "--out" in str(caught.value)
    assert len(seen) == 2 and tree(path) == before
    assert sorted(os.listdir(tmp_path)) == ["cache", "faces"]
    assert colours(prepare(str(folder), 8, out=path).images)[-1] == 90


BUILD = """
    import sys
    from pathlib import Path
    from fastgan.data import build, decode
    from fastgan.data.prepare import prepare
    build.open_decoder = lambda size: decode.open_decoder(size, "pillow")
    build.BATCH = 1
    decode_one = decode.PillowDecoder.decode
    def when_told(self, blobs):
        print("ready", flush=True)
        sys.stdin.readline()
        return decode_one(self, blobs)
    decode.PillowDecoder.decode = when_told
    prepare(sys.argv[1], 8, out=Path(sys.argv[2]))
"""


def start_build(folder, path):
    """A process that waits before each file for a line on its stdin; its end lets it run freely."""
    arguments = [sys.executable, "-c", textwrap.dedent(BUILD), str(folder), str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True)


def wait_ready(child):
    while "ready" not in child.stdout.readline():
        assert child.poll() is None


def test_a_killed_build_is_swept_by_the_next(folder, tmp_path):
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
    made = prepare(str(folder), 8, out=path)
    assert colours(made.images) == [0, 10, 20, 30, 40]
    assert set(os.listdir(tmp_path)) == {"cache", "faces", elsewhere.name, alive.name}


def test_two_processes_build_the_same_cache_at_once(folder, tmp_path):
    path = tmp_path / "cache"
    builds = [start_build(folder, path) for _ in range(2)]
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
        build._install(building, path, fingerprint)
        barrier.wait(60)  # the parent looks
        barrier.wait(60)


def test_many_finish_at_the_same_moment(folder, tmp_path):
    """Four of two kinds want the same place: whatever the order, a whole one is there."""
    made, path = prepare(str(folder), 8, out=tmp_path / "made"), tmp_path / "cache"
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
