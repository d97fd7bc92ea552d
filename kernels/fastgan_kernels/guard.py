"""Whether a network's gradients and its loss are finite, and what follows from it for the step, in
one launch and without a word to the host.

With now[i] whether gradient i holds an Inf or a NaN, and over whether any does:

    fatal = loss is not finite, or over and (there is no scale, or scale <= least)
    bad   = bad or fatal
    if bad and frozen == 0:  flags = now, lost = loss
    found = bad or over
    if last and bad:         frozen = frozen + 1

`bad` stays from the first step on that was not finite, `flags` and `lost` say what was met there,
`frozen` counts the steps since, that one included, and `found` is what an optimizer skips its step
by. With a `scale` of the loss (float16) an overflow alone is skipped by `found`, and is fatal only
where the scale, halved again and again, is down to `least`. Of several networks that share a step,
and `bad` and `frozen`, the last one's call has `last`.

Bytes: those of the gradients, once.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ._launch import DTYPES, MOST, choose, counters, is_dense, jit, launch, tl

BLOCK = 4096  # elements a program: eight 16-byte loads (float32) in flight of each of 128 threads
WARPS = 4
INF = float("inf")


def guard_ref(
    grads: Sequence[Tensor],
    loss: Tensor,
    *,
    flags: Tensor,
    bad: Tensor,
    frozen: Tensor,
    lost: Tensor,
    found: Tensor,
    scale: Tensor | None = None,
    least: float = 0.0,
    last: bool = False,
) -> None:
    """The definition, written out; every other implementation is held to it."""
    now = torch.stack([~g.isfinite().all() for g in grads])
    over = bool(now.any())
    fatal = not bool(loss.isfinite())
    fatal |= over and (scale is None or bool(scale <= least))
    stop = bool(bad) or fatal
    if stop and not bool(frozen):
        flags.copy_(now)
        lost.copy_(loss)
    bad.fill_(float(stop))
    found.fill_(float(stop or over))
    if last:
        frozen += stop


def _guard_torch(
    grads: Sequence[Tensor],
    loss: Tensor,
    *,
    flags: Tensor,
    bad: Tensor,
    frozen: Tensor,
    lost: Tensor,
    found: Tensor,
    scale: Tensor | None = None,
    least: float = 0.0,
    last: bool = False,
) -> None:
    """PyTorch's operators. An infinity norm is the largest absolute value, or NaN where one is:
    unlike a sum it is finite whenever all elements are.
    """
    wide = torch.float64 if torch.float64 in {t.dtype for t in (*grads, loss)} else torch.float32
    sizes: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(g.dtype for g in grads):  # PyTorch's kernel takes one at a time
        which = [i for i, g in enumerate(grads) if g.dtype == dtype and g.numel()]
        norms = torch._foreach_norm([grads[i] for i in which], INF, dtype=wide) if which else ()
        sizes |= zip(which, norms, strict=True)
    for i in set(range(len(grads))) - set(sizes):  # without elements
        sizes[i] = loss.new_zeros((), dtype=wide)
    ordered = [sizes[i] for i in range(len(grads))]
    wrong = ~(torch.stack([*ordered, loss.abs().to(wide)]) < INF)
    now, over, fatal = wrong[:-1], wrong[:-1].any(), wrong[-1]
    fatal = fatal | (over if scale is None else over & (scale <= least))
    stop = fatal | (bad > 0)
    first = stop & (frozen == 0)
    torch.where(first, now.to(flags.dtype), flags, out=flags)
    torch.where(first, loss.to(lost.dtype), lost, out=lost)
    bad.copy_(stop)
    found.copy_(stop | over)
    if last:
        frozen += stop


@jit
def _guard_kernel(
    grad_ptrs,  # tuple of [NUMELS[i]]
    loss_ptr,  # []
    scale_ptr,  # [] float32, or None
    flags_ptr,  # [COUNT] int32
    bad_ptr,  # [] float32 or bool
    frozen_ptr,  # [] int64
    lost_ptr, found_ptr,  # [] float32
    ended_ptr,  # [1 + COUNT] int32: the programs that have ended; of each gradient, what it holds
    programs, least,
    # of tensor i: its elements, its first program, its place among the COUNT
    NUMELS: tl.constexpr, STARTS: tl.constexpr, PLACES: tl.constexpr, TENSORS: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr,  # a power of two, COUNT or more
    LAST: tl.constexpr, DECIDES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    now_ptr = ended_ptr + 1
    place = program * 0
    wrong = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(TENSORS):
        if (program >= STARTS[i]) & (program < STARTS[i + 1]):
            at = (program - STARTS[i]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(grad_ptrs[i] + at, mask=at < NUMELS[i], other=0.0).to(tl.float32)
            wrong = (~(tl.abs(g) < float("inf"))).to(tl.int32)
            place = program * 0 + PLACES[i]
    if tl.max(wrong, axis=0) != 0:
        tl.atomic_or(now_ptr + place, 1, sem="relaxed", scope="gpu")
    if DECIDES:  # of several launches
        tl.debug_barrier()  # this program has said what it found before it is counted
        if tl.atomic_add(ended_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
            at = tl.arange(0, WIDTH)
            inside = at < COUNT
            now = tl.load(now_ptr + at, mask=inside, other=0)
            over = tl.max(now, axis=0) != 0
            loss = tl.load(loss_ptr).to(tl.float32)
            frozen = tl.load(frozen_ptr)
            fatal = over
            if scale_ptr is not None:
                fatal = over & (tl.load(scale_ptr) <= least)
            fatal = fatal | ~(tl.abs(loss) < float("inf"))
            stop = fatal | (tl.load(bad_ptr).to(tl.float32) > 0)
            tl.debug_barrier()  # all threads have read what is now written
            if stop & (frozen == 0):
                tl.store(flags_ptr + at, now, mask=inside)
                tl.store(lost_ptr, loss)
            tl.store(bad_ptr, stop.to(bad_ptr.dtype.element_ty))
            tl.store(found_ptr, (stop | over).to(tl.float32))
            if LAST:
                tl.store(frozen_ptr, frozen + stop.to(tl.int64))
            tl.store(now_ptr + at, tl.zeros([WIDTH], tl.int32), mask=inside)
            tl.store(ended_ptr, 0)


@torch.library.custom_op(
    "fastgan_kernels::guard", mutates_args=("flags", "bad", "frozen", "lost", "found")
)
def _guard_fused(
    grads: Sequence[Tensor],
    loss: Tensor,
    flags: Tensor,
    bad: Tensor,
    frozen: Tensor,
    lost: Tensor,
    found: Tensor,
    scale: Tensor | None,
    least: float,
    last: bool,
) -> None:
    count = len(grads)
    filled = [i for i, g in enumerate(grads) if g.numel()]
    ended, launches = counters(1 + count, flags.device), range(0, len(filled), MOST)
    for first in launches:
        here = filled[first : first + MOST]
        numels = tuple(grads[i].numel() for i in here)
        starts = (0, *accumulate(-(-numel // BLOCK) for numel in numels))
        launch(
            _guard_kernel,
            (starts[-1],),
            tuple(grads[i] for i in here), loss, scale, flags, bad, frozen, lost, found, ended,
            starts[-1], least,
            device=flags.device, num_warps=WARPS,
            NUMELS=numels, STARTS=starts, PLACES=tuple(here), TENSORS=len(here),
            COUNT=count, WIDTH=1 << (count - 1).bit_length(),
            LAST=last, DECIDES=first == launches[-1], BLOCK=BLOCK,
        )  # fmt: skip


@_guard_fused.register_fake
def _(*args):
    return None


@torch.no_grad()
def guard(
    grads: Sequence[Tensor],
    loss: Tensor,
    *,
    flags: Tensor,
    bad: Tensor,
    frozen: Tensor,
    lost: Tensor,
    found: Tensor,
    scale: Tensor | None = None,
    least: float = 0.0,
    last: bool = False,
    impl: str = "auto",
) -> None:
    """Look at the gradients and the loss of a network's step; see the top of this file.

    Args:
        grads: of the network's parameters, any shapes, layouts and floating types.
        loss: 0-d.
        flags: int32 [gradients], of the first step that was not finite: 1 where a gradient was not.
        bad: 0-d bool or float32, whether this step or one before was not finite.
        frozen: 0-d int64, the steps that were not applied.
        lost: 0-d float32, the loss of the first of them.
        found: 0-d float32, 1 where the optimizer must skip its step (`adam_ema`'s `found_inf`).
        scale: 0-d float32, what the loss was multiplied by; None: an overflow is fatal.
        least: the scale at which it is fatal all the same.
        last: this is the step's last network.
        impl: "triton" in one launch (of up to 64 tensors), "torch" (PyTorch's operators, nothing
            read by the host), "ref" (the definition); "auto" is "triton" on an NVIDIA GPU for
            float32, bfloat16 and float16, and "torch" elsewhere.

    Raises:
        ValueError: no gradient, or an argument of another shape, type or device.
    """
    _check(grads, loss, flags, bad, frozen, lost, found, scale)
    filled = [g for g in grads if g.numel()] or grads
    kind = choose("guard", impl, filled[0], _fault(grads, loss))
    if kind == "triton":
        dense = [g if is_dense(g) else g.contiguous() for g in grads]
        _guard_fused(dense, loss, flags, bad, frozen, lost, found, scale, least, last)
        return
    run = guard_ref if kind == "ref" else _guard_torch
    run(
        grads,
        loss,
        flags=flags,
        bad=bad,
        frozen=frozen,
        lost=lost,
        found=found,
        scale=scale,
        least=least,
        last=last,
    )


def _check(
    grads: Sequence[Tensor],
    loss: Tensor,
    flags: Tensor,
    bad: Tensor,
    frozen: Tensor,
    lost: Tensor,
    found: Tensor,
    scale: Tensor | None,
) -> None:
    if not grads:
        raise ValueError("guard: grads must hold at least one tensor, got none")
    device = flags.device
    for i, g in enumerate(grads):
        if not g.is_floating_point() or g.layout != torch.strided or g.device != device:
            got = f"{g.dtype} {g.layout} on {g.device}"
            raise ValueError(f"guard: grads[{i}] must be floating, strided, on {device}, got {got}")
    if flags.dtype != torch.int32 or flags.shape != (len(grads),) or not flags.is_contiguous():
        got = f"{flags.dtype} {tuple(flags.shape)}, strides {flags.stride()}"
        raise ValueError(f"guard: flags must be contiguous int32 [{len(grads)}], got {got}")
    scalars: dict[str, tuple[Tensor, tuple[torch.dtype, ...]]] = {
        "loss": (loss, (*DTYPES, torch.float64)),
        "bad": (bad, (torch.bool, torch.float32)),
        "frozen": (frozen, (torch.int64,)),
        "lost": (lost, (torch.float32,)),
        "found": (found, (torch.float32,)),
    }
    if scale is not None:
        scalars["scale"] = (scale, (torch.float32,))
    for name, (t, takes) in scalars.items():
        if t.dim() or t.dtype not in takes or t.device != device:
            types = " or ".join(str(dtype).removeprefix("torch.") for dtype in takes)
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise ValueError(f"guard: {name} must be a 0-d {types} on {device}, got {got}")


def _fault(grads: Sequence[Tensor], loss: Tensor) -> str:
    """What the kernel cannot take, or ""."""
    for name, t in [*((f"grads[{i}]", g) for i, g in enumerate(grads)), ("loss", loss)]:
        if t.dtype not in DTYPES:
            return f"{name} must be float32, bfloat16 or float16, got {t.dtype}"
    return ""
