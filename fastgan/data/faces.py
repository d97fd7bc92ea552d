"""Drawn faces: flat-illustration portraits whose every generative factor is known.

`fastgan train` without a folder learns from these, so they are aligned, bold enough to read at
64 px, and cost no download. `face_factors` says what a face is made of, `face_paint` paints it.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .face_factors import FACTOR_NAMES, FACTORS, factor_rows, factors, parameters
from .face_paint import Tile, paint_face

__all__ = [
    "FACES_VERSION",
    "FACTORS",
    "FACTOR_NAMES",
    "draw_faces",
    "factor_rows",
    "factors",
    "render",
]

FACES_VERSION = 1  # raise when any pixel changes: caches of drawn faces are rebuilt by it

# 8,192 faces at 64 px on 2 cores: 2.0 s so, 2.4 s with 32 images and 2^17 pixels, 3.4 s with 2^16
_TILE_IMAGES = 64
_TILE_PIXELS = 1 << 18
_BLOCK_IMAGES = 1024  # parameters are worked out for this many at a time


def render(factors: np.ndarray, size: int) -> np.ndarray:
    """Paint faces: factors [n, len(FACTOR_NAMES)] -> uint8 [n, size, size, 3], sRGB.

    Works in as many threads as torch is set to, at most 16, each in a few tens of megabytes at any
    size. Raises ValueError for a size below 16, for factors of another shape, and for values that
    are not finite.
    """
    factors = np.asarray(factors, dtype=np.float32)
    if size < 16:
        raise ValueError(f"render: size must be at least 16, got {size}")
    if factors.ndim != 2 or factors.shape[1] != len(FACTORS):
        raise ValueError(
            f"render: factors must have shape (n, {len(FACTORS)}), got {factors.shape}"
        )
    if not np.isfinite(factors).all():
        raise ValueError("render: factors must be finite, got NaN or infinity")
    out = np.empty((len(factors), size, size, 3), np.uint8)
    images = _TILE_IMAGES if size <= 160 else 1
    rows = min(size, max(8, _TILE_PIXELS // (images * size)))
    # glibc keeps freed blocks up to the size of the largest it has seen go, below 32 MiB. After
    # this it reuses the planes of a tile instead of unmapping them and faulting them in again:
    # 2.0 s for 8,192 faces at 64 px on 2 cores, 3.3 s without.
    torch.empty(30 << 20, dtype=torch.uint8)
    # One thread a tile. Threads that share each operation spin until the last is done, hundreds of
    # times a tile: on a machine busy with something else that took thirty times as long.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, 16), "faces", torch.set_num_threads, (1,)) as pool:
            for block in range(0, len(factors), _BLOCK_IMAGES):
                params = parameters(factors[block : block + _BLOCK_IMAGES])
                here = out[block : block + _BLOCK_IMAGES]
                jobs = [
                    pool.submit(_render_tile, params, i, r, here[i : i + images, r : r + rows])
                    for i in range(0, len(here), images)
                    for r in range(0, size, rows)
                ]
                for job in jobs:
                    job.result()
    finally:
        torch.set_num_threads(threads)  # new threads start from what was set last
    return out


def _render_tile(params: dict[str, np.ndarray], image: int, row: int, out: np.ndarray) -> None:
    """Paint the rows from `row` of the images from `image`: uint8 [images, rows, size, 3]."""
    count, rows, size, _ = out.shape
    with torch.inference_mode():
        p = {k: torch.from_numpy(v[..., image : image + count]) for k, v in params.items()}
        tile = Tile(p, size, row, row + rows)
        paint_face(tile)
        out[:] = tile.pixels()


def draw_faces(count: int, size: int, seed: int = 0, start: int = 0) -> np.ndarray:
    """Faces start .. start+count of a seed: uint8 [count, size, size, 3]; errors as in `render`."""
    if count < 0 or start < 0:
        raise ValueError(f"draw_faces: count and start must be at least 0, got {count}, {start}")
    return render(factor_rows(start, count, seed), size)
