"""What every metric takes: images as the cache holds them, checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def checked(images: ArrayLike, name: str, least: int, edge: int) -> np.ndarray:
    """The images as an array, not copied, and a memory map not read: uint8 [N, H, W, 3].

    Args:
        images: an array, a memory map, or a tensor on the CPU, in any memory layout.
        name: of the function and its argument, for the error.
        least: N at least.
        edge: H and W at least.

    Raises:
        ValueError: of another type or shape. Floats are refused, and not rounded: whoever makes
            them knows their range, and what is not rounded tells generated images from real ones.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{name} must be uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}"
        )
    if len(array) < least:
        raise ValueError(f"{name} must be {least:,} images or more, got {len(array):,}")
    if min(array.shape[1:3]) < edge:
        raise ValueError(f"{name} must be of {edge} px or more a side, got {list(array.shape)}")
    return array


def checked_pair(
    real: ArrayLike, fake: ArrayLike, function: str, least: int, edge: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as `checked` returns them.

    Raises:
        ValueError: as `checked` does, or their images differ in size.
    """
    a = checked(real, f"{function}: real", least, edge)
    b = checked(fake, f"{function}: fake", least, edge)
    if b.shape[1:] != a.shape[1:]:
        raise ValueError(
            f"{function}: fake must be {list(a.shape[1:])} as the real ones are, got "
            f"{list(b.shape[1:])}"
        )
    return a, b
