"""Candidates for the convolutions of a DCGAN, not used by fastgan until a GPU shows that they beat
cuDNN; `test_convs.py` measures them.

Kernel 4, stride 2, padding 1, no bias, NHWC. A layer joins a large map L [B, 2h, 2w, CL] and a
small map S [B, h, w, CS] by one weight W [4, 4, CL, CS] over (kh, kw, cl, cs). PyTorch's weight,
[CS, CL, 4, 4] in both modules, becomes W by `weight.permute(2, 3, 1, 0).contiguous()`. As matrix
products [M, N, K]:

    fwd     L -> S      Conv2d, input gradient of ConvTranspose2d    [B*h*w, CS, 16*CL]
    dgrad   S -> L      ConvTranspose2d, input gradient of Conv2d    4 x [B*h*w, CL, 4*CS]
    wgrad   L, S -> W   weight gradient of both                      [16*CL, CS, B*h*w]

    S[b, i, j] = sum over kh, kw of L[b, 2i + kh - 1, 2j + kw - 1] @ W[kh, kw]
    L[b, 2i + p, 2j + q] = sum over s, t in {0, 1} of
        S[b, i + p - s, j + q - t] @ W[1 - p + 2s, 1 - q + 2t].T, for each of four phases (p, q)

- Pointer form. On the way in it optionally takes max(v, slope * v), v = scale * x + shift, of the
  layer's input: a batch norm and its (leaky) ReLU.
- TMA form, for sm_90: with L seen as [B, h, 2, w, 2*CL] each of the 16 taps is a plain box, and
  what of it lies outside reads as the padding's zeros. Nothing is applied on the way in.
- Narrow form of dgrad, for CL <= 4 (an image, or one with a fourth channel of zeros): all four
  phases in one tile.

fwd and dgrad also give, where asked, the sums of a batch norm over each block of rows, of the
values before they are rounded.

Bytes: both maps and the weight once. The cost is the product, 32*B*h*w*CL*CS operations, or at an
image's few channels the bytes. Computed in float32 (inputs in float32 are not cut to TF32), rounded
once to the input's type; wgrad's result is float32. No atomics, splits and order are fixed: the
same bits every time on one card. Offsets are 32 bits: tensors of fewer than 2^31 elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan_kernels._launch import INTERPRETED, empty, jit, launch, processors, tl, triton

# bfloat16 arithmetic in the interpreter is wrong
WIDE = tl.constexpr(INTERPRETED) if triton is not None else False
STEPS_A_SPLIT = 4  # at least, of wgrad's sum over pixels


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

    def options(self, *names: str) -> dict[str, int]:
        """The launch's options, with the sizes that the kernel takes as they are."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        compiled = {"num_warps": self.warps, "num_stages": self.stages}
        return {name: sizes[name] for name in names} | compiled


class Act(NamedTuple):
    """max(v, slope * v) with v = scale * x + shift."""

    scale: Tensor | None  # [C] float32
    shift: Tensor | None
    slope: float


NO_ACT = Act(None, None, 0.0)


def act_ref(x: Tensor, act: Act) -> Tensor:
    """In float64, rounded to x's type as the kernels round it before the product."""
    v = x.double() * act.scale.double() + act.shift.double()
    return torch.maximum(v, act.slope * v).to(x.dtype)


def fwd_ref(large: Tensor, weight: Tensor) -> Tensor:
    x, w = large.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1)
    return F.conv2d(x, w, stride=2, padding=1).permute(0, 2, 3, 1)


def dgrad_ref(small: Tensor, weight: Tensor) -> Tensor:
    x, w = small.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1)
    return F.conv_transpose2d(x, w, stride=2, padding=1).permute(0, 2, 3, 1)


def wgrad_ref(large: Tensor, small: Tensor) -> Tensor:
    x, dy = large.permute(0, 3, 1, 2), small.permute(0, 3, 1, 2)
    shape = (dy.shape[1], x.shape[1], 4, 4)
    return torch.nn.grad.conv2d_weight(x, shape, dy, stride=2, padding=1).permute(2, 3, 1, 0)


@jit
def _dot(a, b, acc):
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _acted(tile, inside, channel, scale_ptr, shift_ptr, slope):
    """The activation of a tile [pixels, channels]; what is not inside stays 0: padding is after."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel)[None, :]
        v = tile.to(tl.float32) * scale + tl.load(shift_ptr + channel)[None, :]
        tile = tl.where(inside, tl.maximum(v, v * slope), 0.0).to(tile.dtype)
    return tile


@jit
def _store_sums(partial_ptr, row, channel, acc, C: tl.constexpr, AXIS: tl.constexpr):
    """Sums and sums of squares of a block of rows; rows that are not there are 0 in acc."""
    sums_ptr = partial_ptr + row * (2 * C) + channel
    tl.store(sums_ptr, tl.sum(acc, axis=AXIS))
    tl.store(sums_ptr + C, tl.sum(acc * acc, axis=AXIS))


@jit
def _patches(
    large_ptr,  # [B, H, W, CL]
    pixel, in_m,  # [pixels]: of the small map, and whether it is there
    block,
    scale_ptr, shift_ptr,  # [CL] float32, or None
    slope,
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns block * BLOCK and on, over (kh, kw, cl), of the patches that make the small map."""
    y = 2 * (pixel // (W // 2) % (H // 2)) - 1
    x = 2 * (pixel % (W // 2)) - 1
    corner = ((pixel // (H // 2 * (W // 2)) * H + y) * W + x) * CL
    if CL % BLOCK == 0:  # within one tap: one mask a row
        kh = block // (CL // BLOCK) // 4
        kw = block // (CL // BLOCK) % 4
        # in this form Triton 3.6 sees that BLOCK channels lie side by side
        channel = block % (CL // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        inside = (in_m & (y >= -kh) & (y < H - kh) & (x >= -kw) & (x < W - kw))[:, None]
        offset = (kh * W + kw) * CL + channel
    else:  # several taps: (kw, cl) lie side by side in memory
        column = block * BLOCK + tl.arange(0, BLOCK)
        kh = column // (4 * CL)
        along = column % (4 * CL)
        channel = along % CL
        # compared by element and not by pixel: four channels are then still loaded as one
        place = (x * CL)[:, None] + along[None, :]
        inside = in_m[:, None] & (column < 16 * CL)[None, :] & (place >= 0) & (place < W * CL)
        inside = inside & (y[:, None] >= -kh[None, :]) & (y[:, None] < H - kh[None, :])
        offset = kh * (W * CL) + along
    tile = tl.load(large_ptr + corner[:, None] + offset[None, :], mask=inside, other=0.0)
    return _acted(tile, inside, channel, scale_ptr, shift_ptr, slope)


@jit
def _conv_fwd_kernel(
    large_ptr,  # [B, H, W, CL]
    weight_ptr,  # [16 * CL, CS]
    small_ptr,  # [M, CS]
    partial_ptr,  # [ceil(M / BLOCK_M), 2, CS] float32, or None
    scale_ptr, shift_ptr,  # [CL] float32, or None
    slope, M,
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
        patches = _patches(
            large_ptr, pixel, in_m, step, scale_ptr, shift_ptr, slope, H, W, CL, BLOCK_K
        )
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + k[:, None] * CS + n[None, :])
        acc = _dot(patches, weight, acc)
    if partial_ptr is not None:
        _store_sums(partial_ptr, rows, n, acc, CS, 0)
    at = small_ptr + pixel[:, None] * CS + n[None, :]
    tl.store(at, acc.to(small_ptr.dtype.element_ty), mask=in_m[:, None])


@jit
def _neighbours(
    small_ptr,  # [M, CS]
    pixel, M, dy, dx, first_channel,
    scale_ptr, shift_ptr,  # [CS] float32, or None
    slope,
    H: tl.constexpr, W: tl.constexpr, CS: tl.constexpr, BLOCK: tl.constexpr,  # H, W: small
):  # fmt: skip
    """BLOCK channels of the pixels dy below and dx to the right of `pixel`."""
    y = pixel // W % H
    x = pixel % W
    channel = first_channel + tl.arange(0, BLOCK)
    inside = ((pixel < M) & (y >= -dy) & (y < H - dy) & (x >= -dx) & (x < W - dx))[:, None]
    at = small_ptr + pixel[:, None] * CS + ((dy * W + dx) * CS + channel)[None, :]
    tile = tl.load(at, mask=inside, other=0.0)
    return _acted(tile, inside, channel, scale_ptr, shift_ptr, slope)


@jit
def _conv_dgrad_kernel(
    small_ptr,  # [M, CS]
    weight_ptr,  # [16, CL, CS]
    large_ptr,  # [B, 2 * H, 2 * W, CL]
    partial_ptr,  # [ceil(M / BLOCK_M) * 4, 2, CL] float32, or None
    scale_ptr, shift_ptr,  # [CS] float32, or None
    slope, M,
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # the four phases of a block of rows side by side: they share it in L2
    rows = tl.program_id(0) // (CL // BLOCK_N)
    p, q = rows % 4 // 2, rows % 2
    pixel = rows // 4 * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % (CL // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(4 * CS // BLOCK_K):
        s = step // (CS // BLOCK_K) // 2
        t = step // (CS // BLOCK_K) % 2
        first = step % (CS // BLOCK_K) * BLOCK_K
        small = _neighbours(
            small_ptr, pixel, M, p - s, q - t, first, scale_ptr, shift_ptr, slope, H, W, CS, BLOCK_K
        )
        tap = (1 - p + 2 * s) * 4 + 1 - q + 2 * t
        k = first + tl.arange(0, BLOCK_K)
        weight = tl.load(weight_ptr + (tap * CL + n)[None, :] * CS + k[:, None])
        acc = _dot(small, weight, acc)
    if partial_ptr is not None:
        _store_sums(partial_ptr, rows, n, acc, CL, 0)
    place = (pixel // W * 2 + p) * (2 * W) + pixel % W * 2 + q
    at = large_ptr + place[:, None] * CL + n[None, :]
    tl.store(at, acc.to(large_ptr.dtype.element_ty), mask=(pixel < M)[:, None])


@jit
def _conv_dgrad_narrow_kernel(
    small_ptr,  # [M, CS]
    weight_ptr,  # [16, CL, CS]
    large_ptr,  # [B, 2 * H, 2 * W, CL]
    scale_ptr, shift_ptr,  # [CS] float32, or None
    slope, M,
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of 16 columns (p, q, cl) over 3 x 3 neighbours, 9 steps for the 16 of four phases."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, 16)
    p, q, channel = n // (2 * CL), n // CL % 2, n % CL
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    for step in range(9 * CS // BLOCK_K):
        dy = step // (CS // BLOCK_K) // 3 - 1
        dx = step // (CS // BLOCK_K) % 3 - 1
        first = step % (CS // BLOCK_K) * BLOCK_K
        small = _neighbours(
            small_ptr, pixel, M, dy, dx, first, scale_ptr, shift_ptr, slope, H, W, CS, BLOCK_K
        )
        s, t = p - dy, q - dx  # outside of {0, 1}: this neighbour does not reach the phase
        reached = (n < 4 * CL) & (s >= 0) & (s < 2) & (t >= 0) & (t < 2)
        tap = (1 - p + 2 * s) * 4 + 1 - q + 2 * t
        k = first + tl.arange(0, BLOCK_K)
        at = weight_ptr + ((tap * CL + channel) * CS)[None, :] + k[:, None]
        acc = _dot(small, tl.load(at, mask=reached[None, :], other=0.0), acc)
    corner = pixel // W * 2 * (2 * W) + pixel % W * 2
    at = large_ptr + (corner * CL)[:, None] + ((p * (2 * W) + q) * CL + channel)[None, :]
    inside = (pixel < M)[:, None] & (n < 4 * CL)[None, :]
    tl.store(at, acc.to(large_ptr.dtype.element_ty), mask=inside)


@jit
def _conv_wgrad_kernel(
    large_ptr,  # [B, H, W, CL]
    small_ptr,  # [M, CS]
    partial_ptr,  # [splits, 16 * CL, CS] float32
    scale_ptr, shift_ptr,  # [CL] float32, or None
    slope, M, chunk,  # chunk: pixels of a split, a multiple of BLOCK_K
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
        patches = _patches(
            large_ptr, pixel, in_m, block, scale_ptr, shift_ptr, slope, H, W, CL, BLOCK_M
        )
        at = small_ptr + pixel[:, None] * CS + n[None, :]
        acc = _dot(tl.trans(patches), tl.load(at, mask=in_m[:, None], other=0.0), acc)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = partial_ptr + split * (16 * CL * CS) + row[:, None] * CS + n[None, :]
    tl.store(at, acc, mask=(row < 16 * CL)[:, None])


# The TMA form. A tile of pixels is IMAGES x ROWS x the whole width. Row 2i + kh - 1 of L is row
# i + (kh + 1) // 2 - 1 of those of parity (kh + 1) % 2, and the columns likewise. The gathered box
# is the second operand, so acc is transposed: as the first Triton 3.6 to 3.9 would take it from
# shared memory through registers.


@jit
def _conv_fwd_tma_kernel(
    large, weight, small,  # descriptors: [B, H, 2, W, 2 * CL], [16 * CL, CS], [M, CS]
    partial_ptr,  # [row blocks, 2, CS] float32, or None
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
        acc = _dot(tl.trans(weight.load([step * BLOCK_K, n])), tl.trans(patches), acc)
    if partial_ptr is not None:
        _store_sums(partial_ptr, rows, n + tl.arange(0, BLOCK_N), acc, CS, 1)
    small.store([rows * BLOCK_M, n], tl.trans(acc.to(small.dtype)))


@jit
def _conv_dgrad_tma_kernel(
    small, weight, large,  # descriptors: [B, H, W, CS], [16 * CL, CS], [B, H, 2, W, 2 * CL]
    partial_ptr,  # [row blocks * 4, 2, CL] float32, or None
    H: tl.constexpr, W: tl.constexpr, CL: tl.constexpr, CS: tl.constexpr,  # H, W: small
    IMAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = IMAGES * ROWS * W
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
        acc = _dot(weight.load([tap * CL + n, k]), tl.trans(neighbours), acc)
    if partial_ptr is not None:
        _store_sums(partial_ptr, rows, n + tl.arange(0, BLOCK_N), acc, CL, 1)
    phase = tl.reshape(tl.trans(acc.to(large.dtype)), [IMAGES, ROWS, 1, W, BLOCK_N])
    large.store([image, y, p, 0, q * CL + n], phase)


@jit
def _conv_wgrad_tma_kernel(
    large, small,  # descriptors: [B, H, 2, W, 2 * CL], [M, CS]
    partial_ptr,  # [splits, 16 * CL, CS] float32
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
    at = partial_ptr + split * (16 * CL * CS) + row[:, None] * CS + column[None, :]
    tl.store(at, tl.trans(acc))


def conv_fwd(
    large: Tensor, weight: Tensor, block: Block, *, act: Act = NO_ACT, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """S and, with `sums`, [row blocks, 2, CS]: sums and sums of squares of each block's rows.

    Raises:
        ValueError: a block that does not divide the channels, here and in all that follows.
    """
    batch, height, width, cl, cs = *large.shape, weight.shape[3]
    _divides("conv_fwd", ("CS", cs, block.n), ("16 * CL", 16 * cl, block.k))
    small = empty(batch, height // 2, width // 2, cs, dtype=large.dtype, device=large.device)
    rows = -(-small.numel() // cs // block.m)
    partial = empty(rows, 2, cs, device=large.device) if sums else None
    launch(
        _conv_fwd_kernel,
        (rows * (cs // block.n),),
        large, weight, small, partial, *act, small.numel() // cs, height, width, cl, cs,
        device=large.device, **block.options("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )  # fmt: skip
    return small, partial


def conv_dgrad(
    small: Tensor, weight: Tensor, block: Block, *, act: Act = NO_ACT, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """L and, with `sums`, [4 * row blocks, 2, CL], a row a phase. CL <= 4 takes the narrow form,
    which has no sums: an image has no batch norm.
    """
    batch, height, width, cs, cl = *small.shape, weight.shape[2]
    narrow = cl <= 4
    _divides("conv_dgrad", ("CS", cs, block.k), ("CL", cl, 1 if narrow else block.n))
    if narrow and sums:
        raise ValueError(f"conv_dgrad: sums must be False where CL <= 4, got CL = {cl}")
    large = empty(batch, 2 * height, 2 * width, cl, dtype=small.dtype, device=small.device)
    pixels = batch * height * width
    rows = -(-pixels // block.m)
    common = (*act, pixels, height, width, cl, cs)
    if narrow:
        launch(
            _conv_dgrad_narrow_kernel, (rows,), small, weight, large, *common,
            device=small.device, **block.options("BLOCK_M", "BLOCK_K"),
        )  # fmt: skip
        return large, None
    partial = empty(4 * rows, 2, cl, device=small.device) if sums else None
    launch(
        _conv_dgrad_kernel, (4 * rows * (cl // block.n),), small, weight, large, partial, *common,
        device=small.device, **block.options("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )  # fmt: skip
    return large, partial


def conv_wgrad(large: Tensor, small: Tensor, block: Block, *, act: Act = NO_ACT) -> Tensor:
    """W's gradient, float32 [4, 4, CL, CS]."""
    height, width, cl, cs = *large.shape[1:], small.shape[3]
    _divides("conv_wgrad", ("CS", cs, block.n))
    tiles = -(-16 * cl // block.m) * (cs // block.n)
    pixels = small.numel() // cs
    splits, chunk = splits_of(tiles, pixels, block, large.device)
    partial = empty(splits, 4, 4, cl, cs, device=large.device)
    launch(
        _conv_wgrad_kernel,
        (tiles, splits),
        large, small, partial, *act, pixels, chunk, height, width, cl, cs,
        device=large.device, **block.options("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)


def conv_fwd_tma(
    large: Tensor, weight: Tensor, block: Block, *, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `conv_fwd`."""
    batch, height, width, cl, cs = *large.shape, weight.shape[3]
    height, width = height // 2, width // 2
    _divides("conv_fwd_tma", ("CS", cs, block.n), ("CL", cl, block.k))
    images, rows = _box("conv_fwd_tma", block.m, height, width)
    small = empty(batch, height, width, cs, dtype=large.dtype, device=large.device)
    blocks = -(-batch // images) * (height // rows)
    partial = empty(blocks, 2, cs, device=large.device) if sums else None
    launch(
        _conv_fwd_tma_kernel,
        (blocks * (cs // block.n),),
        _parities(large, images, rows, block.k),
        _described(weight, (16 * cl, cs), (block.k, block.n)),
        _described(small, (batch * height * width, cs), (block.m, block.n)),
        partial, height, width, cl, cs, images, rows,
        device=large.device, **block.options("BLOCK_N", "BLOCK_K"),
    )  # fmt: skip
    return small, partial


def conv_dgrad_tma(
    small: Tensor, weight: Tensor, block: Block, *, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `conv_dgrad`; CL is 16 or more."""
    batch, height, width, cs, cl = *small.shape, weight.shape[2]
    _divides("conv_dgrad_tma", ("CL", cl, block.n), ("CS", cs, block.k))
    images, rows = _box("conv_dgrad_tma", block.m, height, width)
    large = empty(batch, 2 * height, 2 * width, cl, dtype=small.dtype, device=small.device)
    blocks = 4 * -(-batch // images) * (height // rows)
    partial = empty(blocks, 2, cl, device=small.device) if sums else None
    launch(
        _conv_dgrad_tma_kernel,
        (blocks * (cl // block.n),),
        _described(small, small.shape, (images, rows, width, block.k)),
        _described(weight, (16 * cl, cs), (block.n, block.k)),
        _parities(large, images, rows, block.n),
        partial, height, width, cl, cs, images, rows,
        device=small.device, **block.options("BLOCK_N", "BLOCK_K"),
    )  # fmt: skip
    return large, partial


def conv_wgrad_tma(large: Tensor, small: Tensor, block: Block) -> Tensor:
    """As `conv_wgrad`."""
    _, height, width, cs, cl = *small.shape, large.shape[3]
    _divides("conv_wgrad_tma", ("CL", cl, block.m), ("CS", cs, block.n))
    images, rows = _box("conv_wgrad_tma", block.k, height, width)
    tiles = 16 * cl // block.m * (cs // block.n)
    pixels = small.numel() // cs
    splits, chunk = splits_of(tiles, pixels, block, large.device)
    partial = empty(splits, 4, 4, cl, cs, device=large.device)
    launch(
        _conv_wgrad_tma_kernel,
        (tiles, splits),
        _parities(large, images, rows, block.m),
        _described(small, (pixels, cs), (block.k, block.n)),
        partial, pixels, chunk, height, width, cl, cs, images, rows,
        device=large.device, **block.options("BLOCK_M", "BLOCK_N"),
    )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)


def splits_of(tiles: int, pixels: int, block: Block, device: torch.device) -> tuple[int, int]:
    """Into how many parts wgrad's sum is split, and the pixels of each: as many programs as fit on
    the card at a time, of at least a few steps each.
    """
    programs = block.programs * processors(device)
    wanted = max(1, min(programs // tiles, pixels // (STEPS_A_SPLIT * block.k)))
    chunk = -(-pixels // wanted // block.k) * block.k
    return -(-pixels // chunk), chunk


def _divides(op: str, *parts: tuple[str, int, int]) -> None:
    for name, size, block in parts:
        if size % block:
            raise ValueError(f"{op}: {name} must be a multiple of the block's {block}, got {size}")


def _box(op: str, pixels: int, height: int, width: int) -> tuple[int, int]:
    """A tile of pixels as (images, rows of each) of a small map."""
    rows = min(height, max(1, pixels // width))
    images = max(1, pixels // (rows * width))
    if images * rows * width != pixels or height % rows:
        raise ValueError(f"{op}: {pixels} pixels are no box of maps of {height}x{width}")
    return images, rows


def _described(x: Tensor, shape: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """A descriptor of contiguous memory, seen in another shape."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return TensorDescriptor(x, list(shape), strides, list(box))


def _parities(large: Tensor, images: int, rows: int, channels: int) -> Any:
    """L as [B, h, 2, w, 2 * CL]: rows of one parity apart, columns of one parity by channel."""
    batch, height, width, cl = large.shape
    shape = (batch, height // 2, 2, width // 2, 2 * cl)
    return _described(large, shape, (images, rows, 1, width // 2, channels))
