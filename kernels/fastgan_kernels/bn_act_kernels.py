"""The Triton kernels of `bn_act`, and the four operators that launch them.

x is [N, C, H, W] in channels-last memory, so a row of C channels a pixel: [G, M, C] with G groups
of M = N/G * H * W rows. Forward and backward are two launches each:

    bn_act_stats        mean and biased variance of each group and channel; the running statistics
    bn_act_apply        y = act((x - mean) * weight / sqrt(var + eps) + bias)
    bn_act_grad_sums    sum of dz and of dz * x_hat over each group's rows; dweight and dbias
    bn_act_grad_apply   dx = weight / sqrt(var + eps) * (dz - sum(dz)/M - x_hat * sum(dz x_hat)/M)

with x_hat = (x - mean) / sqrt(var + eps) and dz = dy where the activation let z pass, which is
computed from x again: no mask and no x_hat is kept. These are the sums of Ioffe and Szegedy 2015,
section 3, after simplification.

Bytes a launch, with n = N*C*H*W elements of s bytes: stats n*s, apply 2*n*s, grad_sums 2*n*s,
grad_apply 3*n*s. What decides the time: at small batches the launch itself (the tensor lies in L2),
at large ones these bytes.

Sums. A program adds up x - pivot and its square in float32 lanes, where the pivot is the mean of
eight of the channel's values, from rows all over the group: the same for every program, so that
partial sums just add up, and near enough to the mean that the variance does not cancel. The last
program of a channel block to finish adds the partial sums in a fixed order: no float atomics, so
the same bits every time. The next tile is asked for before the one at hand is added up, which
hides most of the way to L2 and back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._launch import counters, empty, empty_like, jit, launch, processors, tl

# Partial sums that the last program loads at a time: each trip to L2 is most of a microsecond, and
# all other programs have ended.
ROWS_LAST = 64
REGISTERS = 1 << 16  # of a multiprocessor


@dataclass(frozen=True)
class Launch:
    """How a kernel is laid out: bytes of each tensor that a program loads at a time, and warps."""

    tile_bytes: int
    warps: int


# A tile is 64 channels wide (fewer where there are fewer): one 128-byte line a row of 16-bit
# values. Each of 256 threads then has four 16-byte loads in flight, of x, of x and dy, or of this
# tile and the next; two such programs a multiprocessor cover the latency of its share of the memory
# (32 KB in flight). Registers are held to what lets both in.
OF_X = Launch(tile_bytes=16 << 10, warps=8)
OF_X_AND_NEXT = Launch(tile_bytes=8 << 10, warps=8)
OF_X_AND_DY = Launch(tile_bytes=8 << 10, warps=8)
CHANNELS = 64
# The reductions: this many programs a multiprocessor, each over at least this many tiles; more
# would lengthen what the last program has to add up.
PROGRAMS_PER_SM = 2
TILES_A_PROGRAM = 2


@jit
def _tile(first, stop, c, C, EVEN_C: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the rows from `first` and channels `c`: which are there, and offsets from row `first`."""
    row = tl.arange(0, BLOCK_M)
    inside = (first + row < stop)[:, None]
    if not EVEN_C:
        inside = inside & (c < C)[None, :]
    return inside, row[:, None] * C + c[None, :]


@jit
def _moments(
    partial_ptr,  # [splits, 2, C] float32
    first_channel, C, splits,
    EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The two sums of a group over its splits, in a fixed order."""
    c = first_channel + tl.arange(0, BLOCK_C)
    one = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        inside = (s < splits)[:, None]
        if not EVEN_C:
            inside = inside & (c < C)[None, :]
        at = partial_ptr + s[:, None] * (2 * C) + c[None, :]
        # .cg: written by other multiprocessors, so not from this one's L1
        one += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        two += tl.load(at + C, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(one, axis=0), tl.sum(two, axis=0)


@jit
def _bn_act_stats_kernel(
    x_ptr,  # [groups, M, C]
    partial_ptr,  # [groups, splits, 2, C] float32
    pivot_ptr,  # [groups, C] float32
    counter_ptr,  # [ceil(C / BLOCK_C)] int32
    mean_ptr, var_ptr,  # [groups, C] float32
    running_mean_ptr, running_var_ptr,  # [C] float32
    batches_ptr,  # [] int64
    M, units, chunk, splits, groups, momentum,
    TRACK: tl.constexpr, UNIT: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    split, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = units * UNIT
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    group_ptr = x_ptr + group.to(tl.int64) * M * C
    start, stop = split * chunk, tl.minimum((split + 1) * chunk, M)
    inside, at = _tile(start, stop, c, C, EVEN_C, BLOCK_M)
    x = tl.load(group_ptr + tl.cast(start, tl.int64) * C + at, mask=inside, other=0.0)
    # Eight rows an eighth apart, each a little further into its own: not all of them corners of
    # images, which padding makes unlike the rest.
    i = tl.arange(0, 8)
    sampled = i * (M // 8) + (i * 37 + 11) % tl.maximum(M // 8, 1)
    sample_ptr = group_ptr + sampled.to(tl.int64)[:, None] * C + c[None, :]
    sample = tl.load(sample_ptr, mask=in_c[None, :], other=0.0)
    pivot = tl.sum(sample.to(tl.float32), axis=0) / 8
    one = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_M):
        ahead, at = _tile(first + BLOCK_M, stop, c, C, EVEN_C, BLOCK_M)
        tile_ptr = group_ptr + tl.cast(first + BLOCK_M, tl.int64) * C
        x_ahead = tl.load(tile_ptr + at, mask=ahead, other=0.0)
        inside, _ = _tile(first, stop, c, C, EVEN_C, BLOCK_M)
        shifted = tl.where(inside, x.to(tl.float32) - pivot[None, :], 0.0)
        one += shifted
        two += shifted * shifted
        x = x_ahead
    sums_of_split_ptr = partial_ptr + (group * splits + split) * 2 * C + c
    tl.store(sums_of_split_ptr, tl.sum(one, axis=0), mask=in_c)
    tl.store(sums_of_split_ptr + C, tl.sum(two, axis=0), mask=in_c)
    if split == 0:
        tl.store(pivot_ptr + group * C + c, pivot, mask=in_c)  # for the last program
    tl.debug_barrier()  # all threads' sums are written before one of them counts this program
    if tl.atomic_add(counter_ptr + block, 1, sem="acq_rel", scope="gpu") == splits * groups - 1:
        if TRACK:
            running_mean = tl.load(running_mean_ptr + c, mask=in_c)
            running_var = tl.load(running_var_ptr + c, mask=in_c)
        for g in range(groups):
            one_c, two_c = _moments(
                partial_ptr + g * splits * 2 * C, block * BLOCK_C, C, splits,
                EVEN_C, BLOCK_S, BLOCK_C,
            )  # fmt: skip
            off = one_c / M
            var = two_c / M - off * off
            var = tl.where(var < 0, 0.0, var)
            mean = tl.load(pivot_ptr + g * C + c, mask=in_c, other=0.0, cache_modifier=".cg") + off
            tl.store(mean_ptr + g * C + c, mean, mask=in_c)
            tl.store(var_ptr + g * C + c, var, mask=in_c)
            if TRACK:
                running_mean += momentum * (mean - running_mean)
                running_var += momentum * (var * (M / (M - 1.0)) - running_var)
        if TRACK:
            tl.store(running_mean_ptr + c, running_mean, mask=in_c)
            tl.store(running_var_ptr + c, running_var, mask=in_c)
            if block == 0:
                tl.store(batches_ptr, tl.load(batches_ptr) + groups)
        tl.store(counter_ptr + block, 0)


@jit
def _normalise(x, mean, var, weight, bias, eps):
    """x_hat [BLOCK_M, BLOCK_C] and z, float32, the same in every kernel; 1 / sqrt(var + eps)."""
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    x_hat = (x.to(tl.float32) - mean[None, :]) * rstd[None, :]
    return x_hat, x_hat * weight[None, :] + bias[None, :], rstd


@jit
def _channel(mean_ptr, var_ptr, weight_ptr, bias_ptr, group, c, in_c, C):
    """What a channel block is normalised by, [BLOCK_C] each."""
    return (
        tl.load(mean_ptr + group * C + c, mask=in_c, other=0.0),
        tl.load(var_ptr + group * C + c, mask=in_c, other=1.0),
        tl.load(weight_ptr + c, mask=in_c, other=0.0),
        tl.load(bias_ptr + c, mask=in_c, other=0.0),
    )


@jit
def _bn_act_apply_kernel(
    x_ptr, y_ptr,  # [groups, M, C]
    mean_ptr, var_ptr,  # [groups, C] float32
    weight_ptr, bias_ptr,  # [C] float32
    M, units, eps, negative_slope,
    ACT: tl.constexpr, UNIT: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, block, group = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    C = units * UNIT
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean, var, weight, bias = _channel(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, c, in_c, C
    )  # fmt: skip
    inside, at = _tile(first, M, c, C, EVEN_C, BLOCK_M)
    start = (group.to(tl.int64) * M + first) * C
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0)
    _, z, _ = _normalise(x, mean, var, weight, bias, eps)
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)  # in this form NaN stays NaN
    elif ACT == "leaky_relu":
        z = tl.where(z > 0, z, z * negative_slope)
    tl.store(y_ptr + start + at, z.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _through_act(dy, z, negative_slope, ACT: tl.constexpr):
    """The gradient before the activation, float32."""
    dy = dy.to(tl.float32)
    if ACT == "relu":
        dy = tl.where(z > 0, dy, 0.0)
    elif ACT == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * negative_slope)
    return dy


@jit
def _bn_act_grad_sums_kernel(
    x_ptr, dy_ptr,  # [groups, M, C]
    mean_ptr, var_ptr,  # [groups, C] float32
    weight_ptr, bias_ptr,  # [C] float32
    partial_ptr,  # [groups, splits, 2, C] float32
    counter_ptr,  # [ceil(C / BLOCK_C)] int32
    sums_ptr,  # [groups, 2, C] float32: of dz, of dz * x_hat
    dweight_ptr, dbias_ptr,  # [C] float32
    M, units, chunk, splits, groups, eps, negative_slope,
    ACT: tl.constexpr, UNIT: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    split, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = units * UNIT
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    start, stop = split * chunk, tl.minimum((split + 1) * chunk, M)
    inside, at = _tile(start, stop, c, C, EVEN_C, BLOCK_M)
    begin = (group.to(tl.int64) * M + start) * C
    x = tl.load(x_ptr + begin + at, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + begin + at, mask=inside, other=0.0)
    mean, var, weight, bias = _channel(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, c, in_c, C
    )  # fmt: skip
    one = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    two = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_M):
        ahead, at = _tile(first + BLOCK_M, stop, c, C, EVEN_C, BLOCK_M)
        begin = (group.to(tl.int64) * M + first + BLOCK_M) * C
        x_ahead = tl.load(x_ptr + begin + at, mask=ahead, other=0.0)
        dy_ahead = tl.load(dy_ptr + begin + at, mask=ahead, other=0.0)
        x_hat, z, _ = _normalise(x, mean, var, weight, bias, eps)
        dz = _through_act(dy, z, negative_slope, ACT)
        one += dz
        two += dz * x_hat
        x, dy = x_ahead, dy_ahead
    sums_of_split_ptr = partial_ptr + (group * splits + split) * 2 * C + c
    tl.store(sums_of_split_ptr, tl.sum(one, axis=0), mask=in_c)
    tl.store(sums_of_split_ptr + C, tl.sum(two, axis=0), mask=in_c)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + block, 1, sem="acq_rel", scope="gpu") == splits * groups - 1:
        dbias = tl.zeros([BLOCK_C], tl.float32)
        dweight = tl.zeros([BLOCK_C], tl.float32)
        for g in range(groups):
            one_c, two_c = _moments(
                partial_ptr + g * splits * 2 * C, block * BLOCK_C, C, splits,
                EVEN_C, BLOCK_S, BLOCK_C,
            )  # fmt: skip
            tl.store(sums_ptr + g * 2 * C + c, one_c, mask=in_c)
            tl.store(sums_ptr + g * 2 * C + C + c, two_c, mask=in_c)
            dbias += one_c
            dweight += two_c
        tl.store(dbias_ptr + c, dbias, mask=in_c)
        tl.store(dweight_ptr + c, dweight, mask=in_c)
        tl.store(counter_ptr + block, 0)


@jit
def _bn_act_grad_apply_kernel(
    x_ptr, dy_ptr, dx_ptr,  # [groups, M, C]
    mean_ptr, var_ptr,  # [groups, C] float32
    weight_ptr, bias_ptr,  # [C] float32
    sums_ptr,  # [groups, 2, C] float32
    M, units, eps, negative_slope, per_value,
    ACT: tl.constexpr, UNIT: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, block, group = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    C = units * UNIT
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    mean, var, weight, bias = _channel(
        mean_ptr, var_ptr, weight_ptr, bias_ptr, group, c, in_c, C
    )  # fmt: skip
    mean_dz = tl.load(sums_ptr + group * 2 * C + c, mask=in_c, other=0.0) * per_value
    mean_dz_x_hat = tl.load(sums_ptr + group * 2 * C + C + c, mask=in_c, other=0.0) * per_value
    inside, at = _tile(first, M, c, C, EVEN_C, BLOCK_M)
    start = (group.to(tl.int64) * M + first) * C
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + start + at, mask=inside, other=0.0)
    x_hat, z, rstd = _normalise(x, mean, var, weight, bias, eps)
    dz = _through_act(dy, z, negative_slope, ACT)
    dx = (rstd * weight)[None, :] * (dz - mean_dz[None, :] - x_hat * mean_dz_x_hat[None, :])
    tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def rows(x: Tensor, groups: int) -> int:
    """M, the values a channel has in each group."""
    return x.shape[0] // groups * x.shape[2] * x.shape[3]


def _blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


class _Tiling:
    """How the rows and channels of x are shared out among programs.

    A kernel takes C as `units` times the constant `UNIT`, the power of two (up to 16) that divides
    it: what Triton has to know to load 16 bytes at a time, with one compilation for all such C.
    """

    def __init__(self, x: Tensor, groups: int, settings: Launch) -> None:
        self.m, self.channels, self.groups = rows(x, groups), x.shape[1], groups
        self.device = x.device
        unit = min(16, self.channels & -self.channels)
        self.units = self.channels // unit
        block_c = min(CHANNELS, 1 << (self.channels - 1).bit_length())
        elements = settings.tile_bytes // x.element_size()
        if unit * x.element_size() < 16:  # narrower loads are more of them, each with its mask
            elements = min(elements, 8 * 32 * settings.warps)
        self.block_m = elements // block_c
        self.columns = _blocks(self.channels, block_c)
        self.options: dict[str, Any] = {
            "device": x.device,
            "num_warps": settings.warps,
            "maxnreg": REGISTERS // (2 * 32 * settings.warps),
            "UNIT": unit,
            "EVEN_C": self.channels % block_c == 0,
            "BLOCK_M": self.block_m,
            "BLOCK_C": block_c,
        }

    def each(self) -> tuple[int, int, int]:
        """The grid of a kernel with a program a tile."""
        return _blocks(self.m, self.block_m), self.columns, self.groups

    def split(self) -> tuple[int, int]:
        """(chunk, splits) of a reduction: each split of M is `chunk` rows, in whole tiles."""
        wanted = PROGRAMS_PER_SM * processors(self.device) // (self.columns * self.groups)
        most = _blocks(self.m, self.block_m * TILES_A_PROGRAM)
        chunk = _blocks(_blocks(self.m, max(1, min(wanted, most))), self.block_m) * self.block_m
        return chunk, _blocks(self.m, chunk)

    def per_group(self, *sizes: int) -> Tensor:
        """float32 [groups, *sizes, C]"""
        return empty(self.groups, *sizes, self.channels, device=self.device)


@torch.library.custom_op(
    "fastgan_kernels::bn_act_stats",
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def bn_act_stats(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    groups: int,
    momentum: float,
    track: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, float32 [groups, C]; with `track` the running statistics move."""
    tiling = _Tiling(x, groups, OF_X_AND_NEXT)
    chunk, splits = tiling.split()
    mean, var = tiling.per_group(), tiling.per_group()
    launch(
        _bn_act_stats_kernel,
        (splits, tiling.columns, groups),
        x, tiling.per_group(splits, 2), tiling.per_group(), counters(tiling.columns, x.device),
        mean, var, running_mean, running_var, num_batches_tracked,
        tiling.m, tiling.units, chunk, splits, groups, momentum,
        TRACK=track, BLOCK_S=ROWS_LAST, **tiling.options,
    )  # fmt: skip
    return mean, var


@bn_act_stats.register_fake
def _(x, running_mean, running_var, num_batches_tracked, groups, momentum, track):
    shape = (groups, x.shape[1])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fastgan_kernels::bn_act_apply", mutates_args=())
def bn_act_apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
) -> Tensor:
    """y, like x; `mean` and `var` are [groups, C]."""
    tiling = _Tiling(x, mean.shape[0], OF_X)
    y = empty_like(x)
    launch(
        _bn_act_apply_kernel,
        tiling.each(),
        x, y, mean, var, weight, bias, tiling.m, tiling.units, eps, negative_slope,
        ACT=act, **tiling.options,
    )  # fmt: skip
    return y


@bn_act_apply.register_fake
def _(x, mean, var, weight, bias, eps, act, negative_slope):
    return torch.empty_like(x)


@torch.library.custom_op("fastgan_kernels::bn_act_grad_sums", mutates_args=())
def bn_act_grad_sums(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 sums [groups, 2, C] of dz and dz * x_hat, dweight [C], dbias [C]."""
    tiling = _Tiling(x, mean.shape[0], OF_X_AND_DY)
    chunk, splits = tiling.split()
    sums, dweight, dbias = tiling.per_group(2), empty_like(weight), empty_like(bias)
    launch(
        _bn_act_grad_sums_kernel,
        (splits, tiling.columns, tiling.groups),
        x, dy, mean, var, weight, bias,
        tiling.per_group(splits, 2), counters(tiling.columns, x.device), sums, dweight, dbias,
        tiling.m, tiling.units, chunk, splits, tiling.groups, eps, negative_slope,
        ACT=act, BLOCK_S=ROWS_LAST, **tiling.options,
    )  # fmt: skip
    return sums, dweight, dbias


@bn_act_grad_sums.register_fake
def _(x, dy, mean, var, weight, bias, eps, act, negative_slope):
    sums = x.new_empty((mean.shape[0], 2, x.shape[1]), dtype=torch.float32)
    return sums, torch.empty_like(weight), torch.empty_like(bias)


@torch.library.custom_op("fastgan_kernels::bn_act_grad_apply", mutates_args=())
def bn_act_grad_apply(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor,
    count: int,
    eps: float,
    act: str,
    negative_slope: float,
) -> Tensor:
    """dx, like x; `sums` are of `count` values each, of none where the statistics are constants."""
    tiling = _Tiling(x, mean.shape[0], OF_X_AND_DY)
    dx = empty_like(x)
    launch(
        _bn_act_grad_apply_kernel,
        tiling.each(),
        x, dy, dx, mean, var, weight, bias, sums,
        tiling.m, tiling.units, eps, negative_slope, 1.0 / count if count else 0.0,
        ACT=act, **tiling.options,
    )  # fmt: skip
    return dx


@bn_act_grad_apply.register_fake
def _(x, dy, mean, var, weight, bias, sums, count, eps, act, negative_slope):
    return torch.empty_like(x)
