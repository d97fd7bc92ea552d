"""The images of a zip: listed from its directory, read where they lie, never extracted."""

from __future__ import annotations

import os
import stat
import zipfile
from datetime import UTC, datetime
from typing import IO, Any

from ..console import warn
from ..errors import UsageError
from .image_file import MAX_FILE_BYTES, ImageFile, Member, suffix_of

MAX_MEMBERS = 4_000_000  # zipfile makes an object of half a kilobyte of each
MAX_RATIO = 200  # of a member or of all, to the bytes it is packed in: images hardly shrink at all
KINDS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}
RATIO_FREE_BYTES = 1 << 20  # a small one may be of one colour


def list_archive(path: str, suffixes: tuple[str, ...], flag: str) -> list[ImageFile]:
    """All members with an image's suffix, in the directory's order; of two with one name the later.

    Members that are not to be trusted (a path out of the archive, a link, a wild ratio, encrypted)
    are listed with their fault. Raises `UsageError`, naming `flag`, for what is no zip, or one that
    claims to hold more than a zip of images can.
    """
    try:
        # the archive's own end first: the directory may be larger than the memory
        with open(path, "rb") as file:
            count = most_members(file)
        if count > MAX_MEMBERS:
            raise UsageError(
                f"{flag}: {path} may have {count:,} members, over {MAX_MEMBERS:,}; give its images "
                "as several archives, or as a folder"
            )
        with zipfile.ZipFile(path) as archive:
            listed = [info for info in archive.infolist() if not info.is_dir()]
            members = {info.filename: info for info in listed}
        whole = os.path.getsize(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError) as error:
        raise UsageError(f"{flag}: {path} cannot be read as a zip: {error}") from None
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be read: {error.strerror or error}") from None
    if len(members) < len(listed):
        again = len(listed) - len(members)
        warn(f"{path} has {again:,} members whose names come again: the last of a name counts")
    claimed = sum(info.file_size for info in members.values())
    if claimed > MAX_RATIO * whole + RATIO_FREE_BYTES:
        raise UsageError(
            f"{flag}: {path} claims to hold {claimed:,} bytes in {whole:,}, "
            f"more than {MAX_RATIO} times as much: no archive of images does"
        )
    images = [info for info in members.values() if _is_image(info.filename, suffixes)]
    return [_listed(path, whole, info) for info in images]


def most_members(file: IO[bytes]) -> int:
    """How many the directory has room for, from the archive's own end, which says its length."""
    module: Any = zipfile  # its names for the end record are not public, and have been there always
    end = module._EndRecData(file)
    return int(end[module._ECD_SIZE]) // module.sizeCentralDir if end else 0


def _is_image(name: str, suffixes: tuple[str, ...]) -> bool:
    if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return False  # as in a folder; and what macOS keeps beside each file
    return suffix_of(name) in suffixes


def _listed(path: str, whole: int, info: zipfile.ZipInfo) -> ImageFile:
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    member = Member(info.header_offset, info.compress_size, deflated, info.CRC)
    return ImageFile(
        info.filename, path, info.file_size, _mtime_ns(info), member, _fault(info, whole)
    )


def _fault(info: zipfile.ZipInfo, whole: int) -> str:
    """Why a member of an archive of `whole` bytes is refused, or ""."""
    if info.filename.startswith("/") or ".." in info.filename.split("/"):
        return "unsafe name: it leads out of the archive"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "link: members of an archive are not followed"
    if info.flag_bits & 0x1:
        return "encrypted: archives with a password are not read"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        kind = KINDS.get(info.compress_type, f"method {info.compress_type}")
        return f"unsupported compression: {kind}; store or deflate members"
    if info.file_size > MAX_FILE_BYTES:
        return f"too large: {info.file_size:,} bytes, over {MAX_FILE_BYTES:,}"
    stored = info.compress_type == zipfile.ZIP_STORED
    end = info.header_offset + info.compress_size
    stored_otherwise = stored and info.compress_size != info.file_size
    if not 0 <= info.header_offset <= end <= whole or stored_otherwise:
        return "damaged archive: the member's place or sizes do not fit"
    if info.file_size > MAX_RATIO * info.compress_size + RATIO_FREE_BYTES:
        return f"too large: {info.file_size:,} bytes packed in {info.compress_size:,}"
    return ""


def _mtime_ns(info: zipfile.ZipInfo) -> int:
    """The member's time of change, read as UTC: a zip knows no zone."""
    try:
        return int(datetime(*info.date_time, tzinfo=UTC).timestamp()) * 10**9
    except ValueError:  # a month 0: nobody set it
        return 0
