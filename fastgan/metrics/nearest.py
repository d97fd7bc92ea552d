"""The training images nearest to generated ones: whether a generator has learned them by heart.

A copy is much nearer to its original than to the second nearest image. Where the first distance is
about the second one, nothing was copied; it says nothing about copies that are shifted or mirrored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

EDGE = 64  # pixels a side at most that are compared
CHUNK = 1024  # training images at a time: 50 MB
KEPT = 3  # neighbours
SPARE = 5  # candidates more than that: in float32 those at one distance may change places
GAP = 2  # pixels between pictures


@dataclass(frozen=True)
class Neighbours:
    """Attributes:
    rows: int64 [n, 3], of training images, the nearest first.
    distances: float64 [n, 3], root mean square in grey levels.
    """

    rows: np.ndarray
    distances: np.ndarray

    @property
    def ratio(self) -> float:
        """The median of the first distance over the second; 0 where the first is none."""
        first, second = self.distances[:, 0], self.distances[:, 1]
        return float(np.median(np.divide(first, second, out=np.zeros_like(first), where=first > 0)))


def neighbours(samples: np.ndarray, train: np.ndarray) -> Neighbours:
    """The three nearest training images of each sample, by L2 on pixels, at 64 px a side at most.

    Args:
        samples: uint8 [n, H, W, 3].
        train: uint8 [N, H, W, 3], N >= 3. A memory map is read in pieces.
    """
    if len(train) < KEPT:
        raise ValueError(f"neighbours: train must be {KEPT} images or more, got {len(train)}")
    ours = _flat(samples)
    best: np.ndarray = np.zeros((len(ours), 0), np.float32)
    rows: np.ndarray = np.zeros((len(ours), 0), np.int64)
    for start in range(0, len(train), CHUNK):
        theirs = _flat(train[start : start + CHUNK])
        # |a - b|^2 without |a|^2, which is the same for all
        apart = (theirs**2).sum(1) - 2 * (ours @ theirs.T)
        here = np.broadcast_to(np.arange(start, start + len(theirs)), apart.shape)
        best, rows = np.concatenate([best, apart], 1), np.concatenate([rows, here], 1)
        if best.shape[1] > KEPT + SPARE:
            keep = np.argpartition(best, KEPT + SPARE, axis=1)[:, : KEPT + SPARE]
            best, rows = (np.take_along_axis(part, keep, 1) for part in (best, rows))
    exact = np.empty(rows.shape, np.float64)
    for sample, (mine, candidates) in enumerate(zip(ours, rows, strict=True)):
        difference = _flat(train[candidates]).astype(np.float64) - mine
        exact[sample] = np.sqrt((difference**2).mean(1))
    order = np.argsort(exact, axis=1, kind="stable")[:, :KEPT]
    return Neighbours(*(np.take_along_axis(part, order, 1) for part in (rows, exact)))


def _flat(images: np.ndarray) -> np.ndarray:
    """float32 [n, values], around 0: products of small numbers are more precise."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    if max(pixels.shape[2:]) > EDGE:
        pixels = adaptive_avg_pool2d(pixels, (EDGE, EDGE))
    return (pixels.flatten(1) - 127.5).numpy()


def picture(samples: np.ndarray, train: np.ndarray, found: Neighbours) -> Image.Image:
    """Each sample, and right of it its three nearest, in two columns."""
    columns, edge = 2, samples.shape[1] + GAP
    lines = -(-len(samples) // columns)
    block = (1 + KEPT) * edge + 3 * GAP  # a wider gap after the sample
    sheet = Image.new("RGB", (columns * block + 4 * GAP, lines * edge + GAP), "white")
    for number, (sample, rows) in enumerate(zip(samples, found.rows, strict=True)):
        left = GAP + number // lines * (block + 4 * GAP)
        top = GAP + number % lines * edge
        sheet.paste(Image.fromarray(np.asarray(sample)), (left, top))
        for place, row in enumerate(rows, 1):
            image = Image.fromarray(np.asarray(train[row]))
            sheet.paste(image, (left + place * edge + 2 * GAP, top))
    return sheet
