"""Which files of a folder are taken for images, in which order, and what is said of none."""

import os
import socket
import sys

import pytest

from fastgan.data import images
from fastgan.data.images import find_images
from fastgan.errors import UsageError


def touch(path, text=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


def test_takes_images_in_depth_by_the_bytes_of_their_names(tmp_path):
    for name in ("b/z.PNG", "b/a.jpg.chip.jpg", "a.webp", "B.Tiff", "b.pgm", "b-1.jpeg", "é.bmp"):
        touch(tmp_path / name)
    for name in ("notes.txt", "jpg", "a.jpg.part", ".hidden.png", ".git/a.png", "b/.x/a.png"):
        touch(tmp_path / name)
    names = [image.name for image in find_images(tmp_path)]
    assert names == [
        "B.Tiff",
        "a.webp",
        "b-1.jpeg",
        "b.pgm",
        "b/a.jpg.chip.jpg",
        "b/z.PNG",
        "é.bmp",
    ]


def test_the_layout_of_ffhq_and_thousands_of_folders(tmp_path):
    names = [f"{i // 10 * 10:05d}/{i:05d}.png" for i in range(0, 30_000, 10)]
    for name in names:
        touch(tmp_path / name)
    assert [image.name for image in find_images(tmp_path)] == names


def test_records_what_tells_a_changed_file(tmp_path):
    path = touch(tmp_path / "a.png", b"12345")
    os.utime(path, ns=(0, 1_234_567_890_123_456_789))
    (image,) = find_images(tmp_path)
    assert (image.size_bytes, image.mtime_ns) == (5, 1_234_567_890_123_456_789)
    assert image.read() == b"12345"


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_not_utf_8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(b"abc")
    touch(tmp_path / "z.jpg")
    images = find_images(tmp_path)
    assert [os.fsencode(image.name) for image in images] == [b"z.jpg", b"\xff.jpg"]
    assert images[1].read() == b"abc"


def test_links_are_followed_once_and_loops_end(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    touch(data / "own.png")
    touch(other / "far.png", b"1234567")
    (data / "in").symlink_to(other)
    (data / "in-again").symlink_to(other)
    (other / "back").symlink_to(data)
    (data / "file.png").symlink_to(other / "far.png")
    (data / "self.png").symlink_to(data / "self.png")
    (data / "gone.png").symlink_to(tmp_path / "nothing")
    found = {image.name: image for image in find_images(data)}
    lost = "unreadable: a link that leads to no file"
    assert {name: image.size_bytes for name, image in found.items() if not image.fault} == {
        "own.png": 1,
        "in/far.png": 7,
        "file.png": 7,
    }
    assert found["self.png"].read() == found["gone.png"].read() == lost


def test_pipes_and_sockets_are_no_images(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert [image.name for image in find_images(tmp_path)] == ["a.png"]


@pytest.mark.parametrize("what", ["no such path", "it is a file", "no images"])
def test_nothing_to_find(tmp_path, what):
    path = tmp_path / "faces"
    if what == "it is a file":
        path.touch()
    elif what == "no images":
        touch(path / "notes.txt")
        touch(path / "folder.png" / "notes.txt")
    with pytest.raises(UsageError) as caught:
        find_images(path, "--real")
    message = str(caught.value)
    assert message.startswith("--real") and what in message and str(path) in message


def test_a_folder_that_cannot_be_read_is_passed_over_with_a_warning(tmp_path, monkeypatch, capsys):
    """As a disk's lost+found; what was asked for itself is an error."""
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "lost" / "b.jpg")
    entries = images._entries

    def refuse(folder, visited):
        if folder.name == refused:
            raise PermissionError(13, "Permission denied")
        return entries(folder, visited)

    monkeypatch.setattr(images, "_entries", refuse)
    refused = "lost"
    assert [image.name for image in find_images(tmp_path)] == ["a.jpg"]
    said = capsys.readouterr().err
    assert said == f"warning: passed over the folder {tmp_path / 'lost'}: Permission denied\n"
    refused = tmp_path.name
    with pytest.raises(UsageError, match=f"--data: cannot read {tmp_path}: Permission denied"):
        find_images(tmp_path)
