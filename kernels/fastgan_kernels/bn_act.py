"""Batch normalisation and its activation as one operator, with grouped statistics.

    y = act(weight * (x - mean_g) / sqrt(var_g + eps) + bias)

The batch is `groups` equal parts in order, each normalised by its own mean and biased variance
over (N/groups, H, W): the same function as one call a part. The running statistics are updated
part by part, in order, with the unbiased variance, as `nn.BatchNorm2d` does (Ioffe and Szegedy
2015, algorithm 1 and section 3.1).

    x, y                        [N, C, H, W] in float32, bfloat16 or float16 (float64 by PyTorch's
                                own operators); channels-last is the fast layout
    weight, bias,
    running_mean, running_var   [C] float32 (float64 beside a float64 x)
    num_batches_tracked         [] int64

Statistics are computed in float32 at least, whatever x is stored in. Saved for backward: x, the two
statistics a group, weight and bias; the activation's mask is computed from x again. One layer
moves, per element of x and counted in its storage type: forward 1 read for the statistics, 1 read
and 1 write to apply; backward 2 reads to reduce, 2 reads and 1 write to apply; two launches each
(`bn_act_kernels`). What `F.batch_norm` followed by an activation really moves is more, and depends
on the backend.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bn_act_kernels as fused
from . import bn_act_plain as plain
from ._launch import DTYPES, choose
from ._once import once
from .bn_act_plain import Reduce

ACTS = ("relu", "leaky_relu", "none")


def bn_act_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.2,
    groups: int = 1,
) -> Tensor:
    """The definition, written out; every other implementation is held to it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for part in x.chunk(groups):
        v = part.to(wide)
        if training:
            mean, var = v.mean((0, 2, 3)), v.var((0, 2, 3), correction=0)
            n = v.numel() // v.shape[1]
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
        else:
            mean, var = running_mean.to(wide), running_var.to(wide)
        scale = weight.to(wide) * torch.rsqrt(var + eps)
        shift = bias.to(wide) - mean * scale
        z = v * scale[:, None, None] + shift[:, None, None]
        parts.append(plain.activate(z, act, negative_slope).to(x.dtype))
    return torch.cat(parts)


def _bn_act_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    negative_slope: float,
    groups: int,
) -> Tensor:
    """PyTorch's own batch_norm a part, its activation in place (batch_norm's backward needs x, not
    y).
    """
    parts = []
    for part in x.chunk(groups) if groups > 1 else (x,):  # a chunk's backward copies
        z = F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        if act == "relu":
            z = F.relu_(z)
        elif act == "leaky_relu":
            z = F.leaky_relu_(z, negative_slope)
        parts.append(z)
    return parts[0] if groups == 1 else torch.cat(parts)


class _BnAct(torch.autograd.Function):
    """The operator from its four parts, `fused` or `plain`, with room for a reduction between
    them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        act: str,
        negative_slope: float,
        groups: int,
        is_fused: bool,
        reduce: Reduce | None,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        tracked = (running_mean, running_var, num_batches_tracked)
        total = None
        if not training:  # constants, the same for every part
            mean, var = running_mean[None], running_var[None]
        elif is_fused:
            mean, var = fused.bn_act_stats(x, *tracked, groups, momentum, reduce is None)
        else:
            mean, var = plain.bn_act_stats(x, groups)
        if training and reduce is not None:
            mean, var, total = plain.merge(mean, var, fused.rows(x, groups), reduce)
            plain.track(mean, var, total, *tracked, momentum)
        ctx.save_for_backward(x, mean, var, weight, bias, total)
        ctx.options = (eps, act, negative_slope)
        ctx.training, ctx.groups, ctx.is_fused, ctx.reduce = training, groups, is_fused, reduce
        apply = fused.bn_act_apply if is_fused else plain.bn_act_apply
        return apply(x, mean, var, weight, bias, eps, act, negative_slope)

    @staticmethod
    @once("bn_act")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight, bias, total = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        given = (x, dy, mean, var, weight, bias)
        ops: Any = fused if ctx.is_fused else plain
        sums, dweight, dbias = ops.bn_act_grad_sums(*given, *ctx.options)
        count = fused.rows(x, ctx.groups) if ctx.training else 0  # 0: they are constants
        if ctx.reduce is not None and ctx.training:
            sums = plain.reduced(sums, ctx.reduce)
            sums, count = sums / total[:, :, None], 1
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ops.bn_act_grad_apply(*given, sums, count, *ctx.options)
        return dx, dweight, dbias, *(None,) * 11


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    negative_slope: float = 0.2,
    groups: int = 1,
    num_batches_tracked: Tensor | None = None,
    reduce: Reduce | None = None,
    impl: str = "auto",
) -> Tensor:
    """Batch norm and activation over [N, C, H, W]; see the top of this file.

    Args:
        training: normalise by the batch and update the running statistics in place; else by the
            running statistics.
        momentum: the weight of the new statistics, 0 to 1.
        eps: above 0.
        act: "relu", "leaky_relu" (with `negative_slope`, 0 or more) or "none".
        groups: how many equal parts of the batch have statistics of their own.
        num_batches_tracked: counted up by `groups` in training.
        reduce: adds a tensor up over all processes, in place (`torch.distributed.all_reduce`) or
            as its result: each part's statistics are then those of all processes together, whose
            parts may differ in size. Called once in forward (float64) and once in backward
            (float32), by training alone. The gradients of weight and bias stay this process's own
            sums.
        impl: "triton", "torch" (`F.batch_norm`), "ref" (the definition); "auto" is "triton" on an
            NVIDIA GPU where x is float32, bfloat16 or float16 and the vectors are float32, and
            "torch" elsewhere. Only "torch" and "ref", without `reduce`, can be differentiated
            twice.

    Raises:
        ValueError: a shape, option or group count that does not fit, or a part of a single value a
            channel.
    """
    named = {"weight": weight, "bias": bias}
    named |= {"running_mean": running_mean, "running_var": running_var}
    _check(x, named, training, groups)
    check_options("bn_act", momentum, eps, act, negative_slope)
    kind = choose("bn_act", impl, x, _fault(x, named, num_batches_tracked))
    if kind == "triton" or (reduce is not None and training):
        if num_batches_tracked is None:
            num_batches_tracked = torch.empty((), dtype=torch.int64, device=x.device)
        return _BnAct.apply(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            eps,
            act,
            negative_slope,
            groups,
            kind == "triton",
            reduce,
        )
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(groups)
    run = bn_act_ref if kind == "ref" else _bn_act_torch
    return run(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        negative_slope=negative_slope,
        groups=groups,
    )


def check_options(
    what: str, momentum: float | None, eps: float, act: str, negative_slope: float
) -> None:
    """Raise `ValueError` for an option that is out of range."""
    if act not in ACTS:
        raise ValueError(f"{what}: act must be one of {', '.join(ACTS)}, got {act!r}")
    if momentum is None or not 0 <= momentum <= 1:
        raise ValueError(f"{what}: momentum must be a number from 0 to 1, got {momentum}")
    if not eps > 0:
        raise ValueError(f"{what}: eps must be above 0, got {eps}")
    if not negative_slope >= 0:
        raise ValueError(f"{what}: negative_slope must be 0 or more, got {negative_slope}")


def _check(x: Tensor, named: dict[str, Tensor], training: bool, groups: int) -> None:
    if x.dim() != 4:
        raise ValueError(f"bn_act: x must have 4 dimensions [N, C, H, W], got {tuple(x.shape)}")
    count, channels = x.shape[0], x.shape[1]
    if not channels:
        raise ValueError(f"bn_act: x must have a channel at least, got {tuple(x.shape)}")
    for name, vector in named.items():
        got = None if vector is None else tuple(vector.shape)
        if got != (channels,):
            raise ValueError(f"bn_act: {name} must have shape ({channels},), got {got}")
    if groups > 65_535:  # an axis of a grid
        raise ValueError(f"bn_act: groups must be at most 65,535, got {groups}")
    if groups < 1 or count % groups:
        raise ValueError(f"bn_act: groups must divide the batch of {count} evenly, got {groups}")
    if training and (count // groups) * x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            "bn_act: training needs at least 2 values a channel in each group, got x of shape "
            f"{tuple(x.shape)} in {groups} groups"
        )


def _fault(x: Tensor, named: dict[str, Tensor], num_batches_tracked: Tensor | None) -> str:
    """What the kernels cannot take, or ""."""
    if x.dtype not in DTYPES:
        return f"x must be float32, bfloat16 or float16, got {x.dtype}"
    for name, vector in named.items():
        if vector.dtype != torch.float32 or vector.device != x.device:
            got = f"{vector.dtype} on {vector.device}"
            return f"{name} must be float32 on {x.device}, got {got}"
        if not vector.is_contiguous():
            return f"{name} must be contiguous, got strides {vector.stride()}"
    count = num_batches_tracked
    if count is not None and (count.dtype != torch.int64 or count.device != x.device):
        got = f"{count.dtype} on {count.device}"
        return f"num_batches_tracked must be int64 on {x.device}, got {got}"
    return ""
