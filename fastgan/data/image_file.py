"""One image of a source: a file, or a member of a zip that is read in place."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import IO, Any

MAX_FILE_BYTES = 1 << 30  # 64 million pixels of 16-bit RGBA are half of this


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of a member lie in its zip."""

    offset: int  # of its local header
    packed_bytes: int
    deflated: bool  # else stored
    crc32: int


@dataclass(frozen=True, slots=True)
class ImageFile:
    """What looks like an image by its name; nothing has been read from it yet."""

    name: str  # relative to the searched folder or the zip, with `/`
    path: str  # of the file, or of the zip
    size_bytes: int
    mtime_ns: int
    member: Member | None = None
    fault: str = ""  # why it is refused unread, or ""

    def row(self) -> dict[str, Any]:
        """What tells it from other files and from its own earlier contents, as JSON values."""
        row = {"name": self.name, "size_bytes": self.size_bytes, "mtime_ns": self.mtime_ns}
        return row if self.member is None else {**row, "crc32": self.member.crc32}

    def read(self) -> bytes | str:
        """Its bytes, or why there are none: one line, the kind of fault before a colon."""
        if self.fault:
            return self.fault
        if self.size_bytes > MAX_FILE_BYTES:
            return f"too large: {self.size_bytes:,} bytes, over {MAX_FILE_BYTES:,}"
        try:
            with open_regular(self.path) as file:
                if self.member is not None:
                    return _unpack(file, self.member, self.size_bytes)
                return file.read(MAX_FILE_BYTES)
        except OSError as error:
            return f"unreadable: {error.strerror or error}"


LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, of the extra field


def _unpack(file: Any, member: Member, size_bytes: int) -> bytes | str:
    """A member's bytes; never more than its directory says.

    Not by `zipfile`, which reads the whole directory first: seconds and hundreds of megabytes for
    a million members, in every process that reads some of them.
    """
    file.seek(member.offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        return "damaged archive: no member where its directory says"
    _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    file.seek(name_bytes + extra_bytes, 1)
    blob = file.read(member.packed_bytes)
    try:
        if member.deflated:
            blob = zlib.decompressobj(-zlib.MAX_WBITS).decompress(blob, size_bytes + 1)
    except zlib.error as error:
        return f"damaged archive: {error}"
    if len(blob) != size_bytes or zlib.crc32(blob) != member.crc32:
        return "damaged archive: the member's checksum does not fit"
    return bytes(blob)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file to read; `OSError` for what is none by now, such as a pipe, which would block."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(handle, "rb")


def sha256(blob: bytes | str) -> str | None:
    """Of what `ImageFile.read` gave; None for a reason."""
    return hashlib.sha256(blob).hexdigest() if isinstance(blob, bytes) else None


def suffix_of(name: str) -> str:
    """In small letters and without the dot, or ""."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def name_bytes(name: str) -> bytes:
    """A name's bytes, the same in every locale."""
    return name.encode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """A file's name as it can be printed anywhere: stray bytes and control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
