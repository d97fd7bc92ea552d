"""Weights from a path: .safetensors, or .pth and .pt as torch.save writes them, from anybody.

A pickle can run code, and torch's restricted reader, though it runs none, still makes a bytearray
or a tensor of any length for a file of a hundred bytes. So a .pth is looked through before torch
reads it: its pickle may name what a mapping of tensors needs and nothing else, and its zip holds
stored members alone, which are copied into one of our own making: what is checked is what is read.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from .data.archive import most_members
from .data.image_file import open_regular
from .errors import RunError, UsageError

MAX_BYTES = 8 << 30
MAX_HEADER_BYTES = 16 << 20  # of safetensors, JSON: 100,000 tensors
MAX_MEMBERS = 100_000
MAX_OPCODES = 1 << 20  # of a pickle; 60 a tensor, and each may make an object of 200 bytes
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before 1.6, when it was no zip yet
WRAPPERS = {"module", "_orig_mod"}  # DistributedDataParallel's and torch.compile's
STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool"
NEEDED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in STORAGES.split()),
}


class _Refused(Exception):
    """What is wrong with a file of weights."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their plain names (`plain_name`), on the CPU.

    Of a .pth or .pt it is the mapping in it, or the one under "state_dict" there. Nothing in the
    file is run, and memory is taken for at most three times its size.

    Raises:
        UsageError: there is no such file, or it is not of these kinds.
        RunError: it is damaged, or holds something else than tensors by name.
    """
    readers: dict[str, Callable[[IO[bytes], int], Mapping[Any, Any]]] = {
        ".safetensors": _read_safetensors,
        ".pth": _read_pth,
        ".pt": _read_pth,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"weights must be a .safetensors, .pth or .pt file, got {path}")
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"weights {path} cannot be read: {why}") from None
    try:
        with file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if size > MAX_BYTES:
                raise _Refused(f"{size:,} bytes are more than weights have (at most {MAX_BYTES:,})")
            return _named(reader(file, size))
    except _Refused as refused:
        raise RunError(f"weights {path}: {refused}") from None
    except OSError as error:
        raise RunError(f"weights {path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise RunError(f"weights {path}: {size:,} bytes are more than the memory takes") from None


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers added, at any level: `module.a._orig_mod.weight` is
    `a.weight`.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def _named(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """`found` by plain names, each value a tensor whose every element the file holds."""
    result: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise _Refused(f"a name must be text, got {type(name).__name__}")
        if not isinstance(value, Tensor):
            raise _Refused(f"holds more than tensors: {name!r} is of type {type(value).__name__}")
        tensor = value.detach()
        # expanded: without end for whoever copies it
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Refused(f"is damaged: {name!r} {list(tensor.shape)} is larger than its data")
        plain = plain_name(name)
        if plain in result:
            raise _Refused(f"has two tensors that come to the name {plain!r}")
        result[plain] = tensor
    if not result:
        raise _Refused("holds no tensors")
    return result


def _read_safetensors(file: IO[bytes], size: int) -> Mapping[Any, Any]:
    start = file.read(8)
    header_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or header_bytes > size - 8:
        raise _Refused("is cut short, or no safetensors file: its header is longer than the file")
    if header_bytes > MAX_HEADER_BYTES:
        raise _Refused(
            f"a header of {header_bytes:,} bytes is more than weights have (at most "
            f"{MAX_HEADER_BYTES:,})"
        )
    file.seek(0)
    try:
        return safetensors.torch.load(file.read())
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _Refused(f"is damaged: {_line(error)}") from None


def _read_pth(file: IO[bytes], size: int) -> Mapping[Any, Any]:
    start = file.read(4)
    file.seek(0)
    if start == b"PK\3\4":
        content = _repacked(file, size)
    else:
        content = io.BytesIO(file.read())
        _check_legacy(content)
    content.seek(0)
    try:
        found = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes torch's reader stumble over
        raise _Refused(f"is damaged: {_line(error)}") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise _Refused(f"must hold a mapping of names to tensors, got {type(found).__name__}")
    return found


def _repacked(file: IO[bytes], size: int) -> io.BytesIO:
    """The members that torch reads, checked, in a new zip."""
    try:
        # before zipfile makes an object of each
        if (count := most_members(file)) > MAX_MEMBERS:
            raise _Refused(f"may have {count:,} members, over {MAX_MEMBERS:,}")
        content = io.BytesIO()
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(content, "w") as new:
            members = old.infolist()
            _check_members(members, size)
            for member in members:
                name = member.filename.partition("/")[2]
                blob = old.read(member)
                if name == "data.pkl":
                    _check_pickle(io.BytesIO(blob))
                if name in ("data.pkl", "byteorder", "version") or name.startswith("data/"):
                    new.writestr(f"weights/{name}", blob)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, IndexError) as error:
        raise _Refused(f"is damaged: {_line(error)}") from None
    return content


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    names = [member.filename for member in members]
    parts = [name.partition("/")[2] for name in names]
    if any(part == "constants.pkl" or part.startswith("code/") for part in parts):
        raise _Refused("is a TorchScript archive, which holds code: save its state_dict instead")
    if len(set(parts)) < len(parts) or "data.pkl" not in parts:
        raise _Refused("is not as torch.save writes it: it must hold one data.pkl")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1:
            raise _Refused(
                f"{member.filename!r} in it is packed or encrypted; torch.save writes neither"
            )
    if sum(member.file_size for member in members) > size:
        raise _Refused("is damaged: its members claim more bytes than it has")


def _check_legacy(content: IO[bytes]) -> None:
    """Before torch 1.6: the magic number, a version, the machine, the mapping, and the storages'
    names, each a pickle; then the storages.
    """
    numbers = _check_pickle(content)
    if numbers != [LEGACY_MAGIC]:
        raise _Refused("is no file of torch.save")
    for _ in range(4):
        _check_pickle(content)


def _check_pickle(content: IO[bytes]) -> list[int]:
    """Look through one pickle, run nothing, and return its numbers of over 31 bits; `_Refused`
    where it is none or names what weights do not need.
    """
    numbers: list[int] = []
    try:
        for count, (opcode, value, _) in enumerate(pickletools.genops(content)):
            if count == MAX_OPCODES:
                raise _Refused("its pickle is longer than that of any weights")
            # STACK_GLOBAL, INST and EXT name it in other ways, which torch.save never took
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise _Refused(f"its pickle uses {opcode.name}, which weights do not need")
            if opcode.name == "GLOBAL" and value not in NEEDED:
                named = str(value).replace(" ", ".")[:99]
                raise _Refused(f"its pickle asks for {named}, which weights do not need; refused")
            if opcode.name == "PROTO" and value != 2:
                raise _Refused(f"its pickle is of protocol {value}, torch.save writes 2")
            if opcode.name == "LONG1" and isinstance(value, int):
                numbers.append(value)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise _Refused(f"is damaged, or no file of torch.save: {_line(error)}") from None
    return numbers


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f"{text[:200]}..."
