"""Zips: which members are images, how they are read, and what is not trusted."""

import stat
import struct
import zipfile

import numpy as np
import pytest
from test_decode import encode, picture

from fastgan.data import archive
from fastgan.data.image_file import ImageFile
from fastgan.data.images import find_images
from fastgan.errors import UsageError


def make(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def reads(path):
    return {image.name: image.read() for image in find_images(path)}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_in_place(compression, tmp_path):
    rng = np.random.default_rng(0)
    members = {f"00{i}/{i:05d}.png": rng.bytes(int(rng.integers(0, 5000))) for i in range(20)}
    members |= {"Ä ß/é😀.JPG": b"x" * 999, "./b.jpeg": b"b"}
    other = {
        ".hidden.png": b"",
        "__MACOSX/._a.png": b"",
        ".git/a.png": b"",
        "a.txt": b"",
        "d/": b"",
    }
    path = make(tmp_path / "faces.ZIP", members | other, compression)
    found = reads(path)
    assert found == members
    assert list(found) == sorted(found, key=str.encode)
    with open(path, "rb") as file:  # an archive may have something before it
        whole = file.read()
    path.write_bytes(b"#!/bin/sh\n" * 50 + whole)
    assert reads(path) == members


def test_an_empty_member_is_an_empty_file(tmp_path):
    assert reads(make(tmp_path / "a.zip", {"a.png": b"", "b.png": b"b"}))["a.png"] == b""


def test_of_two_members_of_a_name_the_later_counts(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("a.png", b"first")
        with pytest.warns(UserWarning, match="Duplicate name"):
            out.writestr("a.png", b"second")
    assert reads(tmp_path / "a.zip") == {"a.png": b"second"}
    assert "a.zip has 1 members whose names come again" in capsys.readouterr().err


def test_what_is_not_trusted_is_refused_by_name(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    bomb = zipfile.ZipInfo("bomb.png")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    rare = zipfile.ZipInfo("rare.png")
    rare.compress_type = zipfile.ZIP_LZMA
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("../up.png", b"1")
        out.writestr("/root.png", b"1")
        out.writestr("a/../../b.png", b"1")
        out.writestr(link, "/etc/passwd")
        out.writestr(bomb, bytes(8 << 20))
        out.writestr(rare, b"1" * 99)
        out.writestr("fine.png", np.random.default_rng(0).bytes(50_000))
    found = reads(tmp_path / "a.zip")
    assert isinstance(found.pop("fine.png"), bytes)
    assert {name: reason.partition(":")[0] for name, reason in found.items()} == {
        "../up.png": "unsafe name",
        "/root.png": "unsafe name",
        "a/../../b.png": "unsafe name",
        "link.png": "link",
        "bomb.png": "too large",
        "rare.png": "unsupported compression",
    }


def patched(path, name, at, value):
    """Overwrite bytes of a member's entry in the directory."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))
    content[entry + at : entry + at + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("at", "value", "kind"),
    [
        (16, b"\0\0\0\1", "damaged archive: the member's checksum does not fit"),
        (20, struct.pack("<I", 0xFFFFFFF0), "damaged archive: the member's place or sizes do not"),
        (24, struct.pack("<I", 99), "damaged archive: the member's"),
        (24, struct.pack("<I", 2 << 30), "too large"),
        (42, struct.pack("<I", 3), "damaged archive: no member where its directory says"),
        (42, struct.pack("<I", 1 << 30), "damaged archive: the member's place or sizes do not fit"),
        (8, b"\1\0", "encrypted"),
    ],
)
def test_damaged_entries(at, value, kind, compression, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_RATIO", 10**9)
    other = b"PNG" * 5000
    path = make(tmp_path / "a.zip", {"a.png": b"abc" * 1000, "b.png": other}, compression)
    patched(path, "a.png", at, value)
    found = reads(path)
    assert found["a.png"].startswith(kind) and found["b.png"] == other


def test_a_member_that_unpacks_to_more_than_it_says_is_cut_off(tmp_path):
    path = make(tmp_path / "a.zip", {"a.png": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    patched(path, "a.png", 24, struct.pack("<I", 1000))
    (image,) = find_images(path)
    assert image.size_bytes == 1000
    assert image.read() == "damaged archive: the member's checksum does not fit"


def test_archives_of_a_size_no_images_have(tmp_path, monkeypatch):
    bomb = make(tmp_path / "bomb.zip", {"a.png": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="--data: .*bomb.zip claims to hold 52,428,800 bytes in"):
        find_images(bomb)
    many = make(tmp_path / "many.zip", {f"{i}.png": b"" for i in range(100)})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 100)  # an entry of 5 bytes more than the least
    with pytest.raises(
        UsageError, match="--data: .*many.zip may have 1[0-9][0-9] members, over 100"
    ):
        find_images(many)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\5\6" + bytes(18), b"PK\3\4" + bytes(99)])
def test_what_is_no_zip(content, tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"--real: .*{path}"):
        find_images(path, "--real")
    with pytest.raises(UsageError, match="--real must be a folder of images, a .zip, .* no such"):
        find_images(tmp_path / "none.zip", "--real")


def test_truncated_at_any_place(tmp_path):
    blob = encode(picture(20, 20))
    path = make(tmp_path / "a.zip", {"a.png": blob, "b.png": blob}, zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(UsageError, match="cannot be read as a zip"):
            find_images(path)


def test_rows_tell_a_member_by_its_checksum(tmp_path):
    rows = [
        [image.row() for image in find_images(make(tmp_path / "a.zip", {"a.png": content}))]
        for content in (b"1", b"2")
    ]
    assert {key for row in rows[0] for key in row} == {"name", "size_bytes", "mtime_ns", "crc32"}
    assert rows[0][0]["crc32"] != rows[1][0]["crc32"]
    assert "crc32" not in ImageFile("a.png", "a.png", 1, 1).row()
