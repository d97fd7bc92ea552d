"""A safetensors file written in one pass: hashed on the way, flushed to the disk, and never as a
whole in memory.

    8 bytes    the header's length, little-endian
    header     JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, spaces up to 8 bytes;
               {"__metadata__": {name: text}} before them, where there is any
    tensors    row-major, one after another; wide types first, so that each begins on its boundary

safetensors' own writers make two copies of it in memory (`save`), or leave it readable for its
owner alone and never flush it (`save_file`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .durable import write_hashed

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
PIECE_BYTES = 1 << 20  # hashed and written while it is in the core's cache


class Plain(NamedTuple):
    """A tensor without torch, whose every call may abort a process in which Python ends while
    another thread is in it.

    Attributes:
        content: its bytes, row-major, in its own memory.
    """

    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    content: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.content)


def plain(t: Tensor) -> Plain:
    """A tensor as its bytes: a view where it is row-major on the CPU, else of a copy.

    Raises:
        TypeError: it is of a type that the format does not have.
    """
    content = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return Plain(_dtype(t), tuple(t.shape), t.itemsize, content)


def _dtype(t: Tensor | Plain) -> str:
    if isinstance(t, Plain):
        return t.dtype
    if t.dtype not in DTYPES:
        raise TypeError(f"{t.dtype} has no place in a safetensors file of fastgan's")
    return DTYPES[t.dtype]


Tensors = Mapping[str, Tensor] | Mapping[str, Plain]


def write_tensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Write a new file and return its bytes and its SHA-256; `metadata` is what it says of itself.

    Tensors that share memory are written under each of their names. One that is not row-major on
    the CPU is copied while it is written; the others are not.

    Raises:
        OSError: it could not be written.
        TypeError: a tensor is of a type that the format does not have.
    """
    return write_hashed(path, _pieces(tensors, metadata))


def file_bytes(tensors: Tensors) -> int:
    """The size of the file that `write_tensors` makes; its errors."""
    return len(_header(_ordered(tensors))) + sum(t.nbytes for t in tensors.values())


def _ordered(tensors: Tensors) -> dict[str, Tensor | Plain]:
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _header(
    ordered: Mapping[str, Tensor | Plain], metadata: Mapping[str, str] | None = None
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, t in ordered.items():
        begin, end = end, end + t.nbytes
        offsets = [begin, end]
        entries[name] = {"dtype": _dtype(t), "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(
    tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    ordered = _ordered(tensors)
    yield _header(ordered, metadata)
    for t in ordered.values():
        content = (t if isinstance(t, Plain) else plain(t)).content
        for at in range(0, len(content), PIECE_BYTES):
            yield content[at : at + PIECE_BYTES]
