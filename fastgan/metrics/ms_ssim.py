"""MS-SSIM as a measure of diversity: how alike images of one set are, pair by pair (Odena et al.
2017, arXiv:1610.09585; the constants of ProGAN's and TensorFlow's code).

MS-SSIM is that of Wang, Simoncelli and Bovik 2003: contrast and structure at five scales, each half
the size of the one before, and luminance at the last. Where an image is smaller than the window of
11 pixels, the window is as small as the image: so it works from 32 px on.

Lower is more diverse, and noise is the lowest: it says something only beside real images' own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from .images import checked

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # their sum is 1.0001, as published
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
SMALLEST = 32  # pixels a side: 2 at the last scale
PIXELS = 1 << 14  # of one side of the pairs at a time, 4 images of 64 px: more leave the cache


def diversity(
    images: ArrayLike, *, seed: int = 0, progress: Callable[[int], object] | None = None
) -> float:
    """The mean MS-SSIM over pairs of a set, each image in one of them; 1 where all are the same.
    Published numbers are of 10,000 images.

    Args:
        images: uint8 [N, H, W, 3], N >= 2 (of an odd N one is left out), H and W 32 or more.
        seed: of who is paired with whom: neighbours in a folder may be alike. The same seed gives
            the same bits.
        progress: is told how many images are done.

    Raises:
        ValueError: of another type or shape.
    """
    array = checked(images, "diversity: images", 2, SMALLEST)
    order = np.random.default_rng(seed).permutation(len(array))
    pairs = order[: len(array) // 2 * 2].reshape(-1, 2)
    step = _at_once(array)
    found = []
    for start in range(0, len(pairs), step):
        some = pairs[start : start + step]
        found.append(ms_ssim(array[some[:, 0]], array[some[:, 1]]))
        if progress is not None:
            progress(2 * (start + len(some)))
    return float(np.concatenate(found).mean())


def ms_ssim(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """float64 [N]: the MS-SSIM of each image of one set with that of another; 1: they are the same.

    A term below 0 counts as 0. An odd last row or column of a scale is left out of the next (at 40
    and 56 px the last scale's).

    Args:
        a, b: uint8 [N, H, W, 3], H and W 32 or more.

    Raises:
        ValueError: of another type or shape.
    """
    first, second = checked(a, "ms_ssim: a", 1, SMALLEST), checked(b, "ms_ssim: b", 1, SMALLEST)
    if first.shape != second.shape:
        raise ValueError(
            f"ms_ssim: b must be {list(first.shape)} as a is, got {list(second.shape)}"
        )
    step = _at_once(first)
    parts = [slice(start, start + step) for start in range(0, len(first), step)]
    return np.concatenate([_of_planes(_planes(first[p]), _planes(second[p])) for p in parts])


def _at_once(images: np.ndarray) -> int:
    return max(1, PIXELS // (images.shape[1] * images.shape[2]))


def _planes(images: np.ndarray) -> np.ndarray:
    """float64 [n, 3, h, w]: in float32 the variance of flat grey would be all rounding."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float64)


def _of_planes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product = np.ones(len(a))
    for scale, weight in enumerate(WEIGHTS):
        if scale:
            a, b = _half(a), _half(b)
        ssim, structure = _ssim(a, b)
        term = ssim if scale == len(WEIGHTS) - 1 else structure
        product *= np.maximum(term, 0) ** weight
    return product


def _half(planes: np.ndarray) -> np.ndarray:
    """The means of two by two pixels."""
    even = planes[..., : planes.shape[2] // 2 * 2, : planes.shape[3] // 2 * 2]
    rows = even[..., ::2, :] + even[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def _ssim(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its term of contrast and structure, the means over each image (Wang et al. 2004)."""
    size = min(WINDOW, *a.shape[2:])
    down, across = _window(a.shape[2], size), _window(a.shape[3], size).T

    def blur(planes: np.ndarray) -> np.ndarray:
        return down @ (planes @ across)

    mean_a, mean_b = blur(a), blur(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance, variances = blur(a * b) - product, blur(a**2 + b**2) - squares
    structure = (2 * covariance + C2) / (variances + C2)
    luminance = (2 * product + C1) / (squares + C1)
    return (luminance * structure).mean((1, 2, 3)), structure.mean((1, 2, 3))


def _window(length: int, size: int) -> np.ndarray:
    """float64 [length - size + 1, length]: the Gaussian at every place where all of it is inside.

    A matrix: at these sizes a product is faster than a convolution in float64. NumPy's, for torch's
    threads wait for each other at every step: 16 times as long on cores that are shared.
    """
    place, start = np.arange(length), np.arange(length - size + 1)[:, None]
    sigma = SIGMA * size / WINDOW
    weight = np.exp(-(((place - start - (size - 1) / 2) / sigma) ** 2) / 2)
    weight *= (place >= start) & (place < start + size)
    return weight / weight.sum(1, keepdims=True)
