"""From the resident image set to a batch of the networks' numbers.

    y[b, c, h, w] = low + (high - low) / 255 * images[index[b], h, w', c]
    w' = W - 1 - w where flip[b], else w

    images    [N, H, W, 3] uint8, contiguous; on the device for the whole run
    index     [B] int64
    y         [B, 3, H, W] in `dtype`, channels-last: an image's values lie as its bytes did

Bytes: 3 H W read and 3 H W sizeof(dtype) written an image. The arithmetic is float32 (float64 for
a float64 result), rounded once to `dtype`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_u8_ref(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """The definition in plain PyTorch."""
    low, high = value_range
    wide = torch.promote_types(dtype, torch.float32)
    batch = images.index_select(0, index)
    if flip is not None:
        batch = torch.where(flip.view(-1, 1, 1, 1), batch.flip(2), batch)
    return batch.to(wide).mul_((high - low) / 255).add_(low).to(dtype).permute(0, 3, 1, 2)


def gather_u8(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """Images `index` of the set as a [B, 3, H, W] channels-last batch in `value_range`; see the
    top of this file.

    Args:
        flip: bool [B], which images to mirror left to right; None mirrors none.

    Raises:
        ValueError: an argument of another shape or type.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(
            "gather_u8: images must be uint8 [N, H, W, 3], "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"gather_u8: index must be int64 [B], got {index.dtype} {tuple(index.shape)}"
        )
    if flip is not None and (flip.dtype != torch.bool or flip.shape != index.shape):
        raise ValueError(
            f"gather_u8: flip must be bool [{index.shape[0]}], got {flip.dtype} {tuple(flip.shape)}"
        )
    return gather_u8_ref(images, index, flip, dtype=dtype, value_range=value_range)
