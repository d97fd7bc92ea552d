"""A step's statistics into their sums and into a ring of the last ones, on the device, in one
launch: adding to them can be part of a captured step.

With row = [*values, 1] in float64:

    if frozen == 0:  sums = sums + row
    if frozen <= 1:  recent[count % R] = row, count = count + 1

    values    K 0-d tensors
    frozen    [] int64: which of the steps that were not applied this is; 0: it was applied
    sums      [K + 1] float64, whose last number counts
    recent    [R, K + 1] float64, the ring; rows of zeros before the first time around
    count     [] int64, how many rows have gone in

The first step that was not applied (`guard`) is among the last ones, so that one can see it, and no
later one is. What it takes is the launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._launch import DTYPES, choose, jit, launch, tl

MOST = 64  # values: their pointers are kernel arguments, and each a load of its own to compile


def tally_ref(
    values: Sequence[Tensor], frozen: Tensor, sums: Tensor, recent: Tensor, count: Tensor
) -> None:
    """The definition, written out; every other implementation is held to it."""
    row = sums.new_tensor([*map(float, values), 1.0])
    if int(frozen) == 0:
        sums += row
    if int(frozen) <= 1:
        recent[int(count) % len(recent)] = row
        count += 1


def _tally_torch(
    values: Sequence[Tensor], frozen: Tensor, sums: Tensor, recent: Tensor, count: Tensor
) -> None:
    """PyTorch's operators. Chosen, not multiplied by 0: a value may be NaN."""
    row = torch.stack([*values, torch.ones_like(values[0])]).to(sums.dtype)
    sums += torch.where(frozen == 0, row, 0)
    place = (count % len(recent)).view(1)
    shown = frozen <= 1
    recent.index_copy_(0, place, torch.where(shown, row, recent.index_select(0, place)))
    count += shown


@jit
def _tally_kernel(
    value_ptrs,  # tuple of [], K of them
    frozen_ptr,  # [] int64
    sums_ptr,  # [K + 1] float64
    recent_ptr,  # [R, K + 1] float64
    count_ptr,  # [] int64
    K: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,  # a power of two, K + 1 or more
):  # fmt: skip
    at = tl.arange(0, WIDTH)
    inside = at <= K
    row = tl.full([WIDTH], 1.0, tl.float64)
    for i in tl.static_range(K):
        row = tl.where(at == i, tl.load(value_ptrs[i]).to(tl.float64), row)
    frozen, count = tl.load(frozen_ptr), tl.load(count_ptr)
    sums = tl.load(sums_ptr + at, mask=inside, other=0.0) + row
    place = count % R
    place += tl.where(place < 0, R, 0)  # of a count from nobody knows where: still within the ring
    if frozen == 0:
        tl.store(sums_ptr + at, sums, mask=inside)
    if frozen <= 1:
        tl.store(recent_ptr + place * (K + 1) + at, row, mask=inside)
        tl.store(count_ptr, count + 1)


@torch.library.custom_op("fastgan_kernels::tally", mutates_args=("sums", "recent", "count"))
def _tally_fused(
    values: Sequence[Tensor], frozen: Tensor, sums: Tensor, recent: Tensor, count: Tensor
) -> None:
    launch(
        _tally_kernel, (1,), tuple(values), frozen, sums, recent, count,
        device=sums.device, num_warps=1,  # whose threads read all before one writes
        K=len(values), R=len(recent), WIDTH=1 << len(values).bit_length(),
    )  # fmt: skip


@_tally_fused.register_fake
def _(*args):
    return None


@torch.no_grad()
def tally(
    values: Sequence[Tensor],
    frozen: Tensor,
    sums: Tensor,
    recent: Tensor,
    count: Tensor,
    impl: str = "auto",
) -> None:
    """Add a step's `values` up and keep them; see the top of this file for the arguments.

    Args:
        impl: "triton" in one launch, "torch" (PyTorch's operators, nothing read by the host), "ref"
            (the definition); "auto" is "triton" on an NVIDIA GPU and "torch" elsewhere.

    Raises:
        ValueError: no value or more than 64, or an argument of another shape, type or device.
    """
    _check(values, frozen, sums, recent, count)
    kind = choose("tally", impl, sums, "")
    if kind == "triton":
        _tally_fused(list(values), frozen, sums, recent, count)
    else:
        (tally_ref if kind == "ref" else _tally_torch)(values, frozen, sums, recent, count)


def _check(
    values: Sequence[Tensor], frozen: Tensor, sums: Tensor, recent: Tensor, count: Tensor
) -> None:
    if not 1 <= len(values) <= MOST:
        raise ValueError(f"tally: values must be 1 to {MOST} tensors, got {len(values)}")
    if recent.dim() != 2 or not len(recent):
        raise ValueError(f"tally: recent must have shape [R, K + 1], got {tuple(recent.shape)}")
    device, width = sums.device, len(values) + 1
    wanted: dict[str, tuple[Tensor, tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "frozen": (frozen, (torch.int64,), ()),
        "sums": (sums, (torch.float64,), (width,)),
        "recent": (recent, (torch.float64,), (len(recent), width)),
        "count": (count, (torch.int64,), ()),
    }
    for i, value in enumerate(values):
        wanted[f"values[{i}]"] = (value, (*DTYPES, torch.float64), ())
    for name, (t, takes, shape) in wanted.items():
        fits = t.dtype in takes and t.shape == shape and t.device == device
        if not fits or not t.is_contiguous():
            types = " or ".join(str(dtype).removeprefix("torch.") for dtype in takes)
            got = f"{t.dtype} {tuple(t.shape)}, strides {t.stride()}, on {t.device}"
            raise ValueError(
                f"tally: {name} must be contiguous {types} {shape} on {device}, got {got}"
            )
