"""The Triton kernels of `conv4x4`: three products that join a large map and a small one.

Kernel 4, stride 2, padding 1, no bias, channels-last. A layer joins a large map L [B, 2h, 2w, CL]
and a small map S [B, h, w, CS] by one weight W [CS, 4, 4, CL] over (cs, kh, kw, cl): PyTorch's
[CS, CL, 4, 4], of both modules, in channels-last memory. As matrix products [M, N, K]:

    fwd     L -> S      Conv2d, input gradient of ConvTranspose2d    [B*h*w, CS, 16*CL]
    dgrad   S -> L      ConvTranspose2d, input gradient of Conv2d    4 x [B*h*w, CL, 4*CS]
    wgrad   L, S -> W   weight gradient of both                      [16*CL, CS, B*h*w]

    S[b, i, j] = sum over kh, kw of L[b, 2i + kh - 1, 2j + kw - 1] @ W[:, kh, kw].T
    L[b, 2i + p, 2j + q] = sum over s, t in {0, 1} of
        S[b, i + p - s, j + q - t] @ W[:, 1 - p + 2s, 1 - q + 2t], for each of four phases (p, q)

- Between inner maps by the tensor memory accelerator (TMA, sm_90): with L seen as
  [B, h, 2, w, 2*CL] each of the 16 taps is a plain box, and what of it lies outside reads as the
  padding's zeros.
- At an image (CL of 4 or fewer) by pointers, and dgrad's four phases in one tile. Here fwd applies
  a LeakyReLU on the way out, and wgrad its gradient on the way in.

Bytes: both maps and the weight once. The cost is the product, 32*B*h*w*CL*CS operations, or at an
image's few channels the bytes. Computed in float32 (inputs in float32 are not cut to TF32), rounded
once to the input's type. No atomics, splits and order are fixed: the same bits every time on one
card. Offsets are 32 bits: tensors of fewer than 2^31 elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._launch import INTERPRETED, empty, jit, launch, processors, tl, triton

# bfloat16 arithmetic in the interpreter is wrong
WIDE = tl.constexpr(INTERPRETED) if triton is not None else False
STEPS_A_SPLIT = 4  # at least, of wgrad's sum over pixels
SUMMED = 2048  # values that a program adds up at a time, of a few splits
IMAGE = 4  # channels of a large map that is an image, at most
UNIT = 32  # channels of an inner map are a multiple of it
PIXELS = 64, 128  # of a tile between inner maps


@dataclass(frozen=True)
class Block:
    """What a program takes of a matrix product [M, N, K], and how it is compiled."""

    m: int
    n: int
    k: int  # of one step of the loop
    warps: int
    stages: int
    programs: int = 1  # a multiprocessor, that wgrad splits its sum for

    def __str__(self) -> str:
        twice = f" x{self.programs}" if self.programs > 1 else ""
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{twice}"

    def fitted(self, m: int, n: int, k: int) -> Block:
        """With sizes that divide so many channels (0: of pixels, which may be cut)."""
        sizes = [
            min(size, channels & -channels) if channels else size
            for size, channels in ((self.m, m), (self.n, n), (self.k, k))
        ]
        return replace(self, m=sizes[0], n=sizes[1], k=sizes[2])

    def options(self, *names: str) -> dict[str, int]:
        """The launch's options, with the sizes that the kernel takes as they are."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        compiled = {"num_warps": self.warps, "num_stages": self.stages}
        return {name: sizes[name] for name in names} | compiled


@jit
def _dot(a, b, acc):
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# At an image.


@jit
def _patches(
    large_ptr,  # [B, H, W, CL]
    pixel, in_m,  # [pixels]: of the small map, and whether it is there
    block,
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns block * BLOCK and on, over (kh, kw, cl), of the patches that make the small map."""
    y = 2 * (pixel // (W // 2) % (H // 2)) - 1
    x = 2 * (pixel % (W // 2)) - 1
    corner = ((pixel // (H // 2 * (W // 2)) * H + y) * W + x) * CL
    column = block * BLOCK + tl.arange(0, BLOCK)
    kh = column // (4 * CL)
    along = column % (4 * CL)  # (kw, cl) lie side by side in memory
    # compared by element and not by pixel: four channels are then still loaded as one
    place = (x * CL)[:, None] + along[None, :]
    inside = in_m[:, None] & (column < 16 * CL)[None, :] & (place >= 0) & (place < W * CL)
    inside = inside & (y[:, None] >= -kh[None, :]) & (y[:, None] < H - kh[None, :])
    offset = kh * (W * CL) + along
    return tl.load(large_ptr + corner[:, None] + offset[None, :], mask=inside, other=0.0)


@jit
def _conv4x4_fwd_image_kernel(
    large_ptr,  # [B, H, W, CL]
    weight_ptr,  # [CS, 16 * CL]
    small_ptr,  # [M, CS]
    M, slope,
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # columns first: neighbours share the patches in L2
    rows = tl.program_id(0) // (CS // BLOCK_N)
    pixel = rows * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % (CS // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = pixel < M
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(16 * CL // BLOCK_K):
        patches = _patches(large_ptr, pixel, in_m, step, H, W, CL, BLOCK_K)
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + n[None, :] * (16 * CL) + k[:, None])
        acc = _dot(patches, weight, acc)
    acc = tl.where(acc > 0, acc, acc * slope)
    at = small_ptr + pixel[:, None] * CS + n[None, :]
    tl.store(at, acc.to(small_ptr.dtype.element_ty), mask=in_m[:, None])


@jit
def _conv4x4_dgrad_image_kernel(
    small_ptr,  # [M, CS]
    weight_ptr,  # [16, CL, CS]
    large_ptr,  # [B, 2 * H, 2 * W, CL]
    M,
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of 16 columns (p, q, cl) over 3 x 3 neighbours, 9 steps for the 16 of four phases."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    y = pixel // W % H
    x = pixel % W
    n = tl.arange(0, 16)
    p, q, channel = n // (2 * CL), n // CL % 2, n % CL
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    for step in range(9 * CS // BLOCK_K):
        dy = step // (CS // BLOCK_K) // 3 - 1
        dx = step // (CS // BLOCK_K) % 3 - 1
        k = step % (CS // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (pixel < M) & (y >= -dy) & (y < H - dy) & (x >= -dx) & (x < W - dx)
        at = small_ptr + pixel[:, None] * CS + ((dy * W + dx) * CS + k)[None, :]
        small = tl.load(at, mask=inside[:, None], other=0.0)
        s, t = p - dy, q - dx  # outside of {0, 1}: this neighbour does not reach the phase
        reached = (n < 4 * CL) & (s >= 0) & (s < 2) & (t >= 0) & (t < 2)
        tap = (1 - p + 2 * s) * 4 + 1 - q + 2 * t
        at = weight_ptr + ((tap * CL + channel) * CS)[None, :] + k[:, None]
        acc = _dot(small, tl.load(at, mask=reached[None, :], other=0.0), acc)
    corner = pixel // W * 2 * (2 * W) + pixel % W * 2
    at = large_ptr + (corner * CL)[:, None] + ((p * (2 * W) + q) * CL + channel)[None, :]
    inside = (pixel < M)[:, None] & (n < 4 * CL)[None, :]
    tl.store(at, acc.to(large_ptr.dtype.element_ty), mask=inside)


@jit
def _conv4x4_wgrad_image_kernel(
    large_ptr,  # [B, H, W, CL]
    small_ptr,  # [M, CS]
    y_ptr,  # [M, CS], what fwd gave, or None where it applied no LeakyReLU
    partial_ptr,  # [splits, CS, 16 * CL]
    M, chunk, slope,  # chunk: pixels of a split, a multiple of BLOCK_K
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // (CS // BLOCK_N)
    n = tl.program_id(0) % (CS // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, M), BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        in_m = pixel < M
        patches = _patches(large_ptr, pixel, in_m, block, H, W, CL, BLOCK_M)
        at = pixel[:, None] * CS + n[None, :]
        small = tl.load(small_ptr + at, mask=in_m[:, None], other=0.0)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=in_m[:, None], other=0.0)
            dz = small.to(tl.float32)
            small = tl.where(y > 0, dz, dz * slope).to(small.dtype)
        acc = _dot(tl.trans(patches), small, acc)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = partial_ptr + split * (16 * CL * CS) + n[None, :] * (16 * CL) + row[:, None]
    tl.store(at, acc.to(partial_ptr.dtype.element_ty), mask=(row < 16 * CL)[:, None])


# Between inner maps. A tile of pixels is IMAGES x ROWS x the whole width. Row 2i + kh - 1 of L is
# row i + (kh + 1) // 2 - 1 of those of parity (kh + 1) % 2, and the columns likewise. The gathered
# box is the second operand, so acc is transposed: as the first Triton 3.6 to 3.9 would take it from
# shared memory through registers.


@jit
def _conv4x4_fwd_kernel(
    large, weight, small,  # descriptors: [B, H, 2, W, 2 * CL], [CS, 16 * CL], [M, CS]
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    IMAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = IMAGES * ROWS * W
    rows = tl.program_id(0) // (CS // BLOCK_N)
    n = tl.program_id(0) % (CS // BLOCK_N) * BLOCK_N
    image, y = rows // (H // ROWS) * IMAGES, rows % (H // ROWS) * ROWS
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(16 * CL // BLOCK_K):
        kh = step // (CL // BLOCK_K) // 4 + 1
        kw = step // (CL // BLOCK_K) % 4 + 1
        channel = kw % 2 * CL + step % (CL // BLOCK_K) * BLOCK_K
        patches = large.load([image, y + kh // 2 - 1, kh % 2, kw // 2 - 1, channel])
        patches = tl.reshape(patches, [BLOCK_M, BLOCK_K])
        acc = _dot(weight.load([n, step * BLOCK_K]), tl.trans(patches), acc)
    small.store([rows * BLOCK_M, n], tl.trans(acc.to(small.dtype)))


@jit
def _conv4x4_dgrad_kernel(
    small, weight, large,  # descriptors: [B, H, W, CS], [CS, 16 * CL], [B, H, 2, W, 2 * CL]
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    IMAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = IMAGES * ROWS * W
    # the four phases of a block of rows side by side: they share it in L2
    rows = tl.program_id(0) // (CL // BLOCK_N)
    p, q = rows % 4 // 2, rows % 2
    n = tl.program_id(0) % (CL // BLOCK_N) * BLOCK_N
    image, y = rows // 4 // (H // ROWS) * IMAGES, rows // 4 % (H // ROWS) * ROWS
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(4 * CS // BLOCK_K):
        s = step // (CS // BLOCK_K) // 2
        t = step // (CS // BLOCK_K) % 2
        k = step % (CS // BLOCK_K) * BLOCK_K
        neighbours = tl.reshape(small.load([image, y + p - s, q - t, k]), [BLOCK_M, BLOCK_K])
        tap = (1 - p + 2 * s) * 4 + 1 - q + 2 * t
        acc = _dot(tl.trans(weight.load([k, tap * CL + n])), tl.trans(neighbours), acc)
    phase = tl.reshape(tl.trans(acc.to(large.dtype)), [IMAGES, ROWS, 1, W, BLOCK_N])
    large.store([image, y, p, 0, q * CL + n], phase)


@jit
def _conv4x4_wgrad_kernel(
    large, small,  # descriptors: [B, H, 2, W, 2 * CL], [M, CS]
    partial_ptr,  # [splits, CS, 16 * CL]
    M, chunk,  # chunk: pixels of a split, a multiple of IMAGES * ROWS * W
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    IMAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = IMAGES * ROWS * W
    block = tl.program_id(0) // (CS // BLOCK_N)
    n = tl.program_id(0) % (CS // BLOCK_N) * BLOCK_N
    split = tl.program_id(1)
    kh = block // (CL // BLOCK_M) // 4 + 1
    kw = block // (CL // BLOCK_M) % 4 + 1
    channel = kw % 2 * CL + block % (CL // BLOCK_M) * BLOCK_M
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # images that are not there read as 0 on both sides
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, M), BLOCK_K):
        image = first // BLOCK_K // (H // ROWS) * IMAGES
        y = first // BLOCK_K % (H // ROWS) * ROWS
        patches = large.load([image, y + kh // 2 - 1, kh % 2, kw // 2 - 1, channel])
        patches = tl.reshape(patches, [BLOCK_K, BLOCK_M])
        acc = _dot(tl.trans(small.load([first, n])), patches, acc)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n + tl.arange(0, BLOCK_N)
    at = partial_ptr + split * (16 * CL * CS) + column[:, None] * (16 * CL) + row[None, :]
    tl.store(at, acc.to(partial_ptr.dtype.element_ty))


@jit
def _conv4x4_sum_kernel(
    partial_ptr, out_ptr, splits,  # [splits, NUMEL] float32, [NUMEL]
    NUMEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, splits, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < splits)[:, None] & (at < NUMEL)[None, :]
        acc += tl.load(partial_ptr + row[:, None] * NUMEL + at[None, :], mask=inside, other=0.0)
    y = tl.sum(acc, axis=0)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < NUMEL)


def fwd_image(
    large: Tensor, weight: Tensor, small: Tensor, block: Block, slope: float = 1.0
) -> None:
    """All NHWC and contiguous, here and in what follows; weight [CS, 4, 4, CL]. `slope` is the
    LeakyReLU's.
    """
    batch, height, width, cl = large.shape
    cs = small.shape[3]
    pixels = small.numel() // cs
    launch(
        _conv4x4_fwd_image_kernel, (-(-pixels // block.m) * (cs // block.n),),
        large, weight, small, pixels, slope, height, width, cl, cs,
        device=large.device, **block.options("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )  # fmt: skip


def dgrad_image(small: Tensor, weight: Tensor, large: Tensor, block: Block) -> None:
    batch, height, width, cs = small.shape
    cl = large.shape[3]
    pixels = batch * height * width
    launch(
        _conv4x4_dgrad_image_kernel, (-(-pixels // block.m),),
        small, weight.permute(1, 2, 3, 0).contiguous(), large, pixels, height, width, cl, cs,
        device=small.device, **block.options("BLOCK_M", "BLOCK_K"),
    )  # fmt: skip


def wgrad_image(
    large: Tensor,
    small: Tensor,
    weight: Tensor,
    block: Block,
    y: Tensor | None = None,
    slope: float = 1.0,
) -> None:
    """`small` is the gradient of `y`, the LeakyReLU's output, or of the product itself."""
    _, height, width, cl = large.shape
    cs = small.shape[3]
    tiles, pixels = -(-16 * cl // block.m) * (cs // block.n), small.numel() // cs
    splits, chunk = splits_of(tiles, pixels, block, large.device)
    partial = _partial(weight, splits)
    launch(
        _conv4x4_wgrad_image_kernel, (tiles, splits),
        large, small, y, partial, pixels, chunk, slope, height, width, cl, cs,
        device=large.device, **block.options("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )  # fmt: skip
    _sum(partial, weight, splits)


def fwd(large: Tensor, weight: Tensor, small: Tensor, block: Block) -> None:
    batch, height, width, cs = small.shape
    cl = large.shape[3]
    images, rows = box(block.m, height, width)
    launch(
        _conv4x4_fwd_kernel, (-(-batch // images) * (height // rows) * (cs // block.n),),
        _parities(large, images, rows, block.k),
        _described(weight, (cs, 16 * cl), (block.n, block.k)),
        _described(small, (batch * height * width, cs), (block.m, block.n)),
        height, width, cl, cs, images, rows,
        device=large.device, **block.options("BLOCK_N", "BLOCK_K"),
    )  # fmt: skip


def dgrad(small: Tensor, weight: Tensor, large: Tensor, block: Block) -> None:
    batch, height, width, cs = small.shape
    cl = large.shape[3]
    images, rows = box(block.m, height, width)
    launch(
        _conv4x4_dgrad_kernel, (4 * -(-batch // images) * (height // rows) * (cl // block.n),),
        _described(small, small.shape, (images, rows, width, block.k)),
        _described(weight, (cs, 16 * cl), (block.k, block.n)),
        _parities(large, images, rows, block.n),
        height, width, cl, cs, images, rows,
        device=small.device, **block.options("BLOCK_N", "BLOCK_K"),
    )  # fmt: skip


def wgrad(large: Tensor, small: Tensor, weight: Tensor, block: Block) -> None:
    _, height, width, cs = small.shape
    cl = large.shape[3]
    images, rows = box(block.k, height, width)
    tiles, pixels = 16 * cl // block.m * (cs // block.n), small.numel() // cs
    splits, chunk = splits_of(tiles, pixels, block, large.device)
    partial = _partial(weight, splits)
    launch(
        _conv4x4_wgrad_kernel, (tiles, splits),
        _parities(large, images, rows, block.m),
        _described(small, (pixels, cs), (block.k, block.n)),
        partial, pixels, chunk, height, width, cl, cs, images, rows,
        device=large.device, **block.options("BLOCK_M", "BLOCK_N"),
    )  # fmt: skip
    _sum(partial, weight, splits)


def splits_of(tiles: int, pixels: int, block: Block, device: torch.device) -> tuple[int, int]:
    """Into how many parts wgrad's sum is split, and the pixels of each: as many programs as fit on
    the card at a time, of at least a few steps each.
    """
    programs = block.programs * processors(device)
    wanted = max(1, min(programs // tiles, pixels // (STEPS_A_SPLIT * block.k)))
    chunk = -(-pixels // wanted // block.k) * block.k
    return -(-pixels // chunk), chunk


def box(pixels: int, height: int, width: int) -> tuple[int, int]:
    """A tile of pixels as (images, rows of each) of a small map; (0, 0) where it is none."""
    rows = min(height, max(1, pixels // width))
    images = max(1, pixels // (rows * width))
    fits = images * rows * width == pixels and height % rows == 0
    return (images, rows) if fits else (0, 0)


def unfit(cl: int, cs: int, height: int, width: int) -> str:
    """What keeps a layer from the kernels, by its channels and its small map's size; or ""."""
    if cs % UNIT or (cl % UNIT and cl > IMAGE):
        return f"channels must be a multiple of {UNIT}, or an image's, got {cl} and {cs}"
    if cl > IMAGE and not all(box(pixels, height, width)[0] for pixels in PIXELS):
        return f"64 and 128 pixels must be whole rows of small maps, which are {height}x{width}"
    return ""


def _partial(weight: Tensor, splits: int) -> Tensor:
    """Where wgrad's programs write: the gradient itself, or float32 of each split."""
    return weight if splits == 1 else empty(splits, weight.numel(), device=weight.device)


def _sum(partial: Tensor, weight: Tensor, splits: int) -> None:
    if splits > 1:
        # few values and many splits, or the other way round: as many programs as can be
        numel, rows = weight.numel(), min(128, 1 << (splits - 1).bit_length())
        block = SUMMED // rows
        launch(
            _conv4x4_sum_kernel, (-(-numel // block),), partial, weight, splits,
            NUMEL=numel, ROWS=rows, BLOCK=block, num_warps=4, device=weight.device,
        )  # fmt: skip


def _described(x: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """A descriptor of contiguous memory, seen in another shape; of a copy where it does not begin
    at a multiple of 16 bytes, as a slice of something may not.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = x.clone() if x.data_ptr() % 16 else x
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return TensorDescriptor(x, list(shape), strides, list(block))


def _parities(large: Tensor, images: int, rows: int, channels: int) -> Any:
    """L as [B, h, 2, w, 2 * CL]: rows of one parity apart, columns of one parity by channel."""
    batch, height, width, cl = large.shape
    shape = (batch, height // 2, 2, width // 2, 2 * cl)
    return _described(large, shape, (images, rows, 1, width // 2, channels))
