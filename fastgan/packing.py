"""Tensors of any types side by side in one piece of memory: one copy moves them all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def packed_bytes(tensors: Sequence[Tensor], align: int) -> int:
    """The bytes that tensors take side by side, each beginning on a multiple of `align`."""
    return sum(_room(t, align) for t in tensors)


def places(memory: Tensor, tensors: Sequence[Tensor], align: int) -> list[Tensor]:
    """Views of `memory`, uint8, one after another, each of a tensor's type and shape."""
    views, begin = [], 0
    for t in tensors:
        piece = memory[begin : begin + t.nbytes]
        views.append(piece.view(t.dtype).view(t.shape))
        begin += _room(t, align)
    return views


def _room(t: Tensor, align: int) -> int:
    return -(-t.nbytes // align) * align
