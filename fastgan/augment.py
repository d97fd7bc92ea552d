"""DiffAugment (Zhao et al. 2020, arXiv:2006.10738, as its authors' code has it): what D sees, real
and fake, is changed at random by operators that pass gradients on to G.

It is defined where pixels go from -1 to 1, and with u uniform in [0, 1):

    color         brightness x + (u - 0.5), then saturation m + 2u (x - m) about each pixel's mean m
                  over channels, then contrast m + (u + 0.5)(x - m) about each image's mean
    translation   by whole pixels, up to an eighth of the side each way; 0 comes in
    cutout        a square of half the side, its centre anywhere in the image, becomes 0

In another range they are what the map between the two makes of them: the step of brightness
shrinks with the range, and 0 is its middle.

All is a function of tensors of fixed shapes: nothing is drawn here, nothing read back, and no
gradient adds up by atomics, so that a captured or compiled step gives the same bits each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .config import Augmentation, PixelRange

NUMBERS: dict[str, int] = {"color": 3, "translation": 2, "cutout": 2}  # in the order they act in
SHIFT, CUT = 0.125, 0.5  # of the side


def numbers(policies: Iterable[Augmentation]) -> int:
    """Uniform numbers that an image needs."""
    given = set(policies)
    return sum(count for name, count in NUMBERS.items() if name in given)


def diff_augment(
    images: Tensor,
    policies: Iterable[Augmentation],
    uniform: Tensor,
    pixel_range: PixelRange = (-1.0, 1.0),
) -> Tensor:
    """Images [B, 3, H, W] augmented, in their type and memory format.

    Args:
        policies: which; they act as color, translation, cutout in whatever order they are given.
        uniform: [B, numbers(policies)] in [0, 1), float32 or float64.
        pixel_range: the images'.

    Raises:
        ValueError: `uniform` has another shape.
    """
    given = set(policies)
    wanted = (images.shape[0], numbers(given))
    if tuple(uniform.shape) != wanted:
        raise ValueError(
            f"diff_augment: uniform must have shape {wanted}, got {tuple(uniform.shape)}"
        )
    low, high = pixel_range
    middle, at = (low + high) / 2, 0
    for name, count in NUMBERS.items():
        if name not in given:
            continue
        u, at = uniform[:, at : at + count], at + count
        if name == "color":
            images = _color(images, u, (high - low) / 2)
        elif name == "translation":
            images = _Translation.apply(images, *_shifts(u, images.shape[2:]), middle)
        else:
            images = torch.where(_cut(u, images.shape[2:]), middle, images)
    return images


def _color(images: Tensor, u: Tensor, scale: float) -> Tensor:
    """Brightness, saturation and contrast, in float32 at least; u [B, 3]."""
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    u = u.to(x.dtype)[:, :, None, None, None]
    x = x + (u[:, 0] - 0.5) * scale
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (2 * u[:, 1]) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return ((x - mean) * (u[:, 2] + 0.5) + mean).to(images.dtype)


def _whole(u: Tensor, count: int) -> Tensor:
    """[B, 1] of 0 to count - 1, int64; a product that rounds up to `count` is the last one."""
    return (u * count).long().clamp_max(count - 1)[:, None]


def _shifts(u: Tensor, sides: torch.Size) -> tuple[Tensor, Tensor]:
    """How far to the right and below of it each pixel comes from, [B, 1] each; u [B, 2]."""
    most = [int(side * SHIFT + 0.5) for side in sides]
    rows, columns = (_whole(u[:, i], 2 * m + 1) - m for i, m in enumerate(most))
    return rows, columns


def _cut(u: Tensor, sides: torch.Size) -> Tensor:
    """bool [B, 1, H, W], what is cut out; u [B, 2]."""
    inside = []
    for i, side in enumerate(sides):
        length = int(side * CUT + 0.5)
        first = _whole(u[:, i], side + 1 - length % 2) - length // 2
        place = torch.arange(side, device=u.device)
        inside.append((place >= first) & (place < first + length))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]


class _Translation(torch.autograd.Function):
    """y[b, :, i, j] = x[b, :, i + rows[b], j + columns[b]], and `fill` where that is outside.

    The gradient is the translation back, which fills in 0: a gather as well, where autograd's own
    would scatter with atomics. It can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, fill: float) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return _moved(x, rows, columns, fill)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = ctx.saved_tensors
        return _Translation.apply(dy, -rows, -columns, 0.0), None, None, None


def _moved(x: Tensor, rows: Tensor, columns: Tensor, fill: float) -> Tensor:
    count, _, height, width = x.shape
    i = torch.arange(height, device=x.device) + rows  # [B, H], and j [B, W]
    j = torch.arange(width, device=x.device) + columns
    outside = ((i < 0) | (i >= height))[:, :, None] | ((j < 0) | (j >= width))[:, None, :]
    each = torch.arange(count, device=x.device)[:, None, None]
    i, j = i.clamp(0, height - 1)[:, :, None], j.clamp(0, width - 1)[:, None, :]
    y = x.permute(0, 2, 3, 1)[each, i, j].permute(0, 3, 1, 2)  # channels-last
    if not x.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous()
    # last, since torch 2.11's Dynamo loses the gradient of a function that ends in views
    return torch.where(outside[:, None], fill, y)
