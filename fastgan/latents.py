"""Latents, by their seed: what `fastgan sample`, `interpolate` and every grid draw images from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .config import LatentDist

CHUNK = 256  # images a pass of the generator


def latents(
    seed: int,
    count: int,
    latent: int,
    dist: LatentDist = "normal",
    truncation: float | None = None,
) -> Iterator[Tensor]:
    """float32 [<= CHUNK, latent] pieces of N(0, 1) or U(-1, 1), `count` rows in all; row i depends
    on (seed, i) alone.

    Args:
        truncation: what is further from 0 than this is drawn anew (the truncation trick of Brock et
            al. 2019, arXiv:1809.11096), so that images are more alike and more often good.
    """
    random = np.random.default_rng(seed)
    for start in range(0, count, CHUNK):
        shape = (min(CHUNK, count - start), latent)
        if dist == "uniform":
            span = min(1.0, truncation or 1.0)
            yield torch.from_numpy((random.random(shape, np.float32) * 2 - 1) * np.float32(span))
        elif truncation is None:
            yield torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        else:
            yield _truncated_normal(torch.from_numpy(random.random(shape)), truncation)


def _truncated_normal(uniform: Tensor, truncation: float) -> Tensor:
    """float64 U(0, 1) to float32 N(0, 1) within +-truncation, by the inverse of its distribution:
    drawing anew would make a row depend on how often those before it missed.
    """
    inside = math.erf(truncation / math.sqrt(2))  # the share of N(0, 1) that is
    values = torch.special.ndtri(0.5 + (uniform - 0.5) * inside)
    return values.clamp_(-truncation, truncation).float()  # ndtri(0) is -inf
