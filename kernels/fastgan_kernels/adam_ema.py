"""Adam for all parameters of a network in one launch, with what else has to follow the weights: a
copy in 16 bits for the next step to compute with, and an exponential moving average.

With g the gradient, t the number of steps, everything element by element in float32:

    m = beta1 * m + (1 - beta1) * g                     exp_avg
    v = beta2 * v + (1 - beta2) * g * g                 exp_avg_sq
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as `torch.optim.Adam` has it (Kingma and Ba 2015, algorithm 1), weight decay 0. Then, where asked
for, low = p rounded to bfloat16 or float16, and

    average = average + (1 - 2^(-1/h)) * (p - average),    h = min(half_life, ramp * s)

with s the steps that the average has moved, half_life in steps, and ramp the share of those steps
that the half-life may be at most (StyleGAN2-ADA's `ema_rampup`). Buffers (running statistics) may
be averaged beside the parameters.

`lr` and both counts are 0-d tensors on the device, read and advanced there: a captured graph goes
on counting, and takes another learning rate without a new capture. `grad_scale` is what the
gradients were multiplied by (the contract of `torch.amp.GradScaler`). With `found_inf` not zero
nothing happens: weights, moments, counts, copies and average stay bit for bit, whatever gradients
and buffers hold.

Bytes an element, float32 weights and gradients: 28 (p, m, v read and written, g read), 26 with a
gradient of 16 bits, 2 more for `low`, 8 more for `average`. Bound by these: 84 MB for 3 M
parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ._launch import DTYPES, MOST, choose, counters, is_dense, jit, launch, tl

BLOCK = 1024  # elements a program: a 16-byte load of each array by each of 128 threads, twice
WARPS = 4


@dataclass(frozen=True)
class Average:
    """An exponential moving average that follows the weights; see the top of this file.

    Args:
        params: the average of each parameter, in the parameters' order.
        buffers: (source, average) of each floating-point buffer that is averaged as well.
        step: 0-d float64, how often it has moved.
        half_life: in steps; 0: all of the way at each.
        ramp: the half-life is at most this share of the steps so far.
    """

    params: Sequence[Tensor]
    buffers: Sequence[tuple[Tensor, Tensor]]
    step: Tensor
    half_life: float
    ramp: float

    def __post_init__(self) -> None:
        for name, value in (("half_life", self.half_life), ("ramp", self.ramp)):
            if not value >= 0:
                raise ValueError(f"Average: {name} must be 0 or more, got {value}")

    @torch.no_grad()
    def move(self, params: Sequence[Tensor], skip: Tensor | None = None) -> None:
        """One step after `params`, by PyTorch's own operators; none where `skip`, 0-d, is true."""
        self.step.add_(1 if skip is None else ~skip)
        weight = 1 - torch.exp2(-1 / (self.step * self.ramp).clamp_max(self.half_life))
        sources = [*params, *(source for source, _ in self.buffers)]
        averages = [*self.params, *(average for _, average in self.buffers)]
        change = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(change, weight.to(averages[0].dtype))
        if skip is None:
            torch._foreach_add_(averages, change)
        else:
            torch._foreach_add_(change, averages)
            _write(averages, change, skip)


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor], skip: Tensor) -> None:
    """`values` into `tensors`, nothing where `skip`. Chosen, not multiplied by 0: they may be NaN;
    and chosen on the device: a graph may be in the making.
    """
    for t, value in zip(tensors, values, strict=True):
        torch.where(skip, t, value, out=t)


def adam_ema_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    low: Sequence[Tensor | None] = (),
    average: Average | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The definition, written out; every other implementation is held to it."""
    if found_inf is not None and bool(found_inf):
        return
    beta1, beta2 = betas
    step += 1
    t = step.double()
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = g.to(p.dtype) if grad_scale is None else g.to(p.dtype) / grad_scale
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        step_size = (lr / (1 - beta1**t)).to(p.dtype)
        p -= step_size * m / (v.sqrt() / (1 - beta2**t).sqrt().to(p.dtype) + eps)
    for copy, p in zip(low, params, strict=False):
        if copy is not None:
            copy.copy_(p)
    if average is not None:
        average.step.add_(1)
        half_life = (average.step * average.ramp).clamp_max(average.half_life)
        weight = 1 - 0.5 ** (1 / half_life)
        for source, mean in [*zip(params, average.params, strict=True), *average.buffers]:
            mean += (weight * (source.double() - mean)).to(mean.dtype)


def _adam_ema_torch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    low: Sequence[Tensor | None] = (),
    average: Average | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """PyTorch's fused Adam, called as torch.optim.Adam(fused=True) does, and foreach copies."""
    skip = None if found_inf is None else found_inf != 0
    step += 1 if skip is None else ~skip
    if any(g.dtype != p.dtype for g, p in zip(grads, params, strict=True)):
        wide = [torch.empty_like(p) for p in params]
        torch._foreach_copy_(wide, list(grads))
        grads = wide
    torch._fused_adam_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=None if skip is None else skip.float(),  # it skips at 1 alone
    )
    copies = [(copy, p) for copy, p in zip(low, params, strict=False) if copy is not None]
    if copies and skip is None:
        torch._foreach_copy_([copy for copy, _ in copies], [p for _, p in copies])
    elif skip is not None:
        _write([copy for copy, _ in copies], [p.to(copy.dtype) for copy, p in copies], skip)
    if average is not None:
        average.move(params, skip)


@jit
def _moved(average, value, weight):
    average = average.to(tl.float32)
    return average + weight * (value - average)


@jit
def _adam_ema_kernel(
    param_ptrs, grad_ptrs, exp_avg_ptrs, exp_avg_sq_ptrs,  # tuples of [NUMELS[i]], or None
    low_ptrs, average_ptrs,  # the same; LOWS says which copies are there
    buffer_ptrs, buffer_average_ptrs,  # the same, of the tensors after the parameters
    step_ptr, lr_ptr,  # [] float32
    average_step_ptr,  # [] float64, or None
    grad_scale_ptr, found_inf_ptr,  # [] float32, or None
    counter_ptr,  # [1] int32
    programs, beta1, beta2, rest1, rest2, log2_beta1, log2_beta2, eps, half_life, ramp,
    NUMELS: tl.constexpr, STARTS: tl.constexpr,  # of tensor i: its elements, its first program
    LOWS: tl.constexpr,
    PARAMS: tl.constexpr, BUFFERS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if found_inf_ptr is not None:  # noqa: SIM102  # `and` would look into the None
        if tl.load(found_inf_ptr) != 0:
            return  # every program of every launch: none is counted
    program = tl.program_id(0)
    step = tl.load(step_ptr).to(tl.float64) + 1
    # 1 - beta^t in float64, where beta^t near 1 does not cancel
    correction1 = (1 - tl.exp2(step * log2_beta1)).to(tl.float32)
    correction2 = (1 - tl.exp2(step * log2_beta2)).to(tl.float32)
    step_size = tl.div_rn(tl.load(lr_ptr), correction1)
    root2 = tl.sqrt_rn(correction2)
    if average_step_ptr is not None:
        ramped = ((tl.load(average_step_ptr) + 1) * ramp).to(tl.float32)
        steps = tl.maximum(tl.minimum(ramped, half_life), 1e-30)  # 0: all of the way, at once
        weight = (1 - tl.exp2((-1.0 / steps).to(tl.float64))).to(tl.float32)
    if grad_scale_ptr is not None:
        unscale = 1.0 / tl.load(grad_scale_ptr)  # exact: GradScaler's scales are powers of two
    for i in tl.static_range(PARAMS):
        if (program >= STARTS[i]) & (program < STARTS[i + 1]):
            at = (program - STARTS[i]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < NUMELS[i]
            p = tl.load(param_ptrs[i] + at, mask=inside)
            g = tl.load(grad_ptrs[i] + at, mask=inside).to(tl.float32)
            m = tl.load(exp_avg_ptrs[i] + at, mask=inside)
            v = tl.load(exp_avg_sq_ptrs[i] + at, mask=inside)
            if grad_scale_ptr is not None:
                g *= unscale
            m = beta1 * m + rest1 * g
            v = beta2 * v + rest2 * g * g
            # two units in the last place are enough here, and cost no call of a subroutine
            p -= step_size * (m / (tl.sqrt(v) / root2 + eps))
            tl.store(param_ptrs[i] + at, p, mask=inside)
            tl.store(exp_avg_ptrs[i] + at, m, mask=inside)
            tl.store(exp_avg_sq_ptrs[i] + at, v, mask=inside)
            if LOWS[i]:  # Triton 3.6 cannot ask a tuple whether it is None
                tl.store(low_ptrs[i] + at, p.to(low_ptrs[i].dtype.element_ty), mask=inside)
            if average_step_ptr is not None:
                average = tl.load(average_ptrs[i] + at, mask=inside)
                tl.store(average_ptrs[i] + at, _moved(average, p, weight), mask=inside)
    for i in tl.static_range(BUFFERS):
        if (program >= STARTS[PARAMS + i]) & (program < STARTS[PARAMS + i + 1]):
            at = (program - STARTS[PARAMS + i]).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < NUMELS[PARAMS + i]
            value = tl.load(buffer_ptrs[i] + at, mask=inside)
            average = tl.load(buffer_average_ptrs[i] + at, mask=inside)
            tl.store(buffer_average_ptrs[i] + at, _moved(average, value, weight), mask=inside)
    if LAST:  # of several launches, which all read the counts as they were
        tl.debug_barrier()  # this program has read them before it is counted itself
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(step_ptr, tl.load(step_ptr) + 1)
            if average_step_ptr is not None:
                tl.store(average_step_ptr, tl.load(average_step_ptr) + 1)
            tl.store(counter_ptr, 0)


@torch.library.custom_op(
    "fastgan_kernels::adam_ema",
    mutates_args=(
        "params",
        "exp_avgs",
        "exp_avg_sqs",
        "step",
        "low",
        "averages",
        "buffer_averages",
        "average_step",
    ),
)
def _adam_ema_fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    low: Sequence[Tensor],
    low_of: Sequence[int],
    averages: Sequence[Tensor],
    buffers: Sequence[Tensor],
    buffer_averages: Sequence[Tensor],
    average_step: Tensor | None,
    half_life: float,
    ramp: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    copies = dict(zip(low_of, low, strict=True))  # by the place of their parameter
    lows = [copies.get(i) for i in range(len(params))] if copies else []
    moved = [i for i, p in enumerate(params) if p.numel()]
    kept = [i for i, t in enumerate(buffers) if t.numel()]
    counter, launches = counters(1, step.device), range(0, max(len(moved), len(kept)), MOST)
    for first in launches:
        here, also = moved[first : first + MOST], kept[first : first + MOST]
        numels = (*(params[i].numel() for i in here), *(buffers[i].numel() for i in also))
        starts = (0, *accumulate(-(-numel // BLOCK) for numel in numels))
        launch(
            _adam_ema_kernel,
            (starts[-1],),
            _picked(params, here), _picked(grads, here),
            _picked(exp_avgs, here), _picked(exp_avg_sqs, here),
            _picked(lows, here), _picked(averages, here),
            _picked(buffers, also), _picked(buffer_averages, also),
            step, lr, average_step, grad_scale, found_inf, counter, starts[-1],
            beta1, beta2, 1 - beta1, 1 - beta2, _log2(beta1), _log2(beta2), eps, half_life, ramp,
            device=step.device, num_warps=WARPS, maxnreg=128,
            NUMELS=numels, STARTS=starts, LOWS=tuple(i in copies for i in here),
            PARAMS=len(here), BUFFERS=len(also),
            LAST=first == launches[-1], BLOCK=BLOCK,
        )  # fmt: skip


def _picked(
    tensors: Sequence[Tensor | None], which: Sequence[int]
) -> tuple[Tensor | None, ...] | None:
    """Those of `tensors`; None where there are none, which a kernel knows as it compiles."""
    return tuple(tensors[i] for i in which) if tensors and which else None


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


@_adam_ema_fused.register_fake
def _(*args):
    return None


@torch.no_grad()
def adam_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    low: Sequence[Tensor | None] = (),
    average: Average | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One Adam step over `params`, in place; see the top of this file.

    Args:
        params, exp_avgs, exp_avg_sqs: float32, any dense layout, each moment in its parameter's.
        grads: of the parameters' shapes; float32, bfloat16 or float16.
        step: 0-d float32, the steps taken so far.
        lr: 0-d float32.
        low: bfloat16 or float16 copies of the parameters, or None in the place of some.
        average: what is averaged beside.
        grad_scale, found_inf: 0-d float32 (`torch.amp.GradScaler`); with `found_inf` not zero
            nothing happens. PyTorch's own implementation also divides the gradients by `grad_scale`
            in place.
        impl: "triton" in one launch (of up to 64 tensors), "torch" (`torch.optim.Adam(fused=True)`
            and foreach copies), "ref" (the definition); "auto" is "triton" on an NVIDIA GPU where
            all but gradients and copies is float32, and "torch" elsewhere.

    Raises:
        ValueError: lists of different lengths, or a tensor of another shape, type or layout.
    """
    lists: dict[str, Sequence[Tensor | None]]
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"low": low} if low else {}
    lists |= {"average.params": average.params} if average is not None else {}
    _check(params, lists, average, betas, eps, step, lr)
    scalars = {"step": step, "lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    filled = [p for p in params if p.numel()] or params
    kind = choose("adam_ema", impl, filled[0], _fault(params, lists, average, scalars))
    grads = [as_laid_out(p, g) for p, g in zip(params, grads, strict=True)]
    if kind == "triton":
        pairs = average.buffers if average is not None else []
        _adam_ema_fused(
            list(params),
            grads,
            list(exp_avgs),
            list(exp_avg_sqs),
            step,
            lr,
            *betas,
            eps,
            [copy for copy in low if copy is not None],
            [i for i, copy in enumerate(low) if copy is not None],
            list(average.params) if average is not None else [],
            [source for source, _ in pairs],
            [mean for _, mean in pairs],
            average.step if average is not None else None,
            average.half_life if average is not None else 0.0,
            average.ramp if average is not None else 0.0,
            grad_scale,
            found_inf,
        )
        return
    run = adam_ema_ref if kind == "ref" else _adam_ema_torch
    run(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step,
        lr,
        betas=betas,
        eps=eps,
        low=low,
        average=average,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order (the stride of a
    dimension of size 1 says nothing).
    """
    return all(
        i == j for i, j, size in zip(a.stride(), b.stride(), a.shape, strict=True) if size > 1
    )


def as_laid_out(like: Tensor, t: Tensor) -> Tensor:
    """`t` in the memory layout of `like`, copied only where it is another."""
    return t if same_layout(like, t) else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _check(
    params: Sequence[Tensor],
    lists: dict[str, Sequence[Tensor | None]],
    average: Average | None,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    lr: Tensor,
) -> None:
    if not params:
        raise ValueError("adam_ema: params must hold at least one tensor, got none")
    check_options("adam_ema", betas, eps)
    for name, scalar in {"step": step, "lr": lr}.items():
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            raise ValueError(f"adam_ema: {name} must be a 0-d tensor on the device, got {scalar}")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"adam_ema: {name} must be as many as params, {len(params)}, got {len(tensors)}"
            )
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t is not None:
                _check_pair(f"{name}[{i}]", t, f"params[{i}]", p, layout=name != "grads")
    for i, (source, mean) in enumerate(average.buffers if average is not None else ()):
        _check_pair(f"average.buffers[{i}][1]", mean, f"average.buffers[{i}][0]", source)


def check_options(what: str, betas: tuple[float, float], eps: float) -> None:
    """Raise `ValueError` for an option that is out of range."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{what}: betas must be two numbers from 0 to below 1, got {betas}")
    if not eps >= 0:
        raise ValueError(f"{what}: eps must be 0 or more, got {eps}")


def _check_pair(name: str, t: Tensor, of: str, like: Tensor, layout: bool = True) -> None:
    if t.shape != like.shape or t.layout != torch.strided:
        got = f"{tuple(t.shape)}" + ("" if t.layout == torch.strided else f", {t.layout}")
        raise ValueError(f"adam_ema: {name} must have shape {tuple(like.shape)}, got {got}")
    if layout and not same_layout(like, t):
        raise ValueError(
            f"adam_ema: {name} must have the strides of {of}, {like.stride()}, got {t.stride()}; "
            "make an optimizer after its network has its memory format"
        )


def _fault(
    params: Sequence[Tensor],
    lists: dict[str, Sequence[Tensor | None]],
    average: Average | None,
    scalars: dict[str, Tensor | None],
) -> str:
    """What the kernel cannot take, or ""."""
    device = params[0].device
    everything = {"params": params, **lists}
    everything |= {name: [t] for name, t in scalars.items() if t is not None}
    pairs = average.buffers if average is not None else ()
    everything |= {"average.buffers": [t for pair in pairs for t in pair]}
    for name, tensors in everything.items():
        takes = {"grads": DTYPES, "low": DTYPES}.get(name, (torch.float32,))
        for t in tensors:
            if t is not None and (t.dtype not in takes or t.device != device):
                types = " or ".join(str(dtype).removeprefix("torch.") for dtype in takes)
                return f"{name} must be {types} on {device}, got {t.dtype} on {t.device}"
    if average is not None:
        count = average.step
        if count.dtype != torch.float64 or count.device != device or count.numel() != 1:
            got = f"{count.dtype} {tuple(count.shape)} on {count.device}"
            return f"average.step must be one float64 on {device}, got {got}"
    for i, t in enumerate([*params, *(source for source, _ in pairs)]):
        if not is_dense(t):
            name = f"params[{i}]" if i < len(params) else f"average.buffers[{i - len(params)}]"
            return f"{name} must fill its memory densely, got strides {t.stride()}"
    return ""
