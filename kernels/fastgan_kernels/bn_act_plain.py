"""The parts of `bn_act` in plain PyTorch, for any device and dtype, and what joins the statistics
of several processes. Results are those of `bn_act_kernels`, in float32 at least.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Any]


def activate(z: Tensor, act: str, negative_slope: float) -> Tensor:
    if act == "relu":
        return F.relu(z)
    if act == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return z


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[groups, N / groups, C, H, W]"""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (groups, -1))


def _beside(statistic: Tensor) -> Tensor:
    """[groups, C] or [C], to stand beside [groups, N / groups, C, H, W]."""
    return statistic.unflatten(-1, (1, -1, 1, 1))


def bn_act_stats(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    v = _grouped(x, groups)
    return v.mean((1, 3, 4)), v.var((1, 3, 4), correction=0)


def _normalise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (_grouped(x, len(mean)) - _beside(mean)) * _beside(torch.rsqrt(var + eps))


def bn_act_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> Tensor:
    eps, act, negative_slope = options
    z = _normalise(x, mean, var, eps) * _beside(weight) + _beside(bias)
    # not the other way round: Dynamo of torch 2.11 then loses the gradient
    return activate(z, act, negative_slope).to(x.dtype).flatten(0, 1)


def _dz(x_hat: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, options: Any) -> Tensor:
    _, act, negative_slope = options
    dz = _grouped(dy, len(x_hat)).to(x_hat.dtype)
    slope = {"relu": 0.0, "leaky_relu": negative_slope, "none": 1.0}[act]
    return torch.where(x_hat * _beside(weight) + _beside(bias) > 0, dz, dz * slope)


def bn_act_grad_sums(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    x_hat = _normalise(x, mean, var, options[0])
    dz = _dz(x_hat, dy, weight, bias, options)
    sums = torch.stack([dz.sum((1, 3, 4)), (dz * x_hat).sum((1, 3, 4))], 1)
    return sums, sums[:, 1].sum(0), sums[:, 0].sum(0)


def bn_act_grad_apply(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor,
    count: int,
    *options: Any,
) -> Tensor:
    x_hat = _normalise(x, mean, var, options[0])
    dz = _dz(x_hat, dy, weight, bias, options)
    centred = dz - (_beside(sums[:, 0]) + x_hat * _beside(sums[:, 1])) / count
    dx = _beside(weight * torch.rsqrt(var + options[0])) * centred
    return dx.flatten(0, 1).to(x.dtype)


def reduced(sums: Tensor, reduce: Reduce) -> Tensor:
    """`sums` of all processes; a reduction works in place, or returns them."""
    result = reduce(sums)
    return result if isinstance(result, Tensor) else sums


def merge(mean: Tensor, var: Tensor, count: int, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [groups, C] of all processes' values together, and how many those
    are, [groups, 1].

    The sums are float64: of squares about zero, which no mean up to 1e6 deviations cancels.
    """
    m, v = mean.double(), var.double()
    sums = torch.cat([m, v + m * m, torch.ones_like(m[:, :1])], 1) * count
    sums = reduced(sums, reduce)
    channels = mean.shape[1]
    total = sums[:, -1:]
    m, square = (sums[:, :-1] / total).split(channels, 1)
    v = (square - m * m).clamp_min(0)
    return m.to(mean.dtype), v.to(var.dtype), total.to(mean.dtype)


def track(
    mean: Tensor,
    var: Tensor,
    total: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
) -> None:
    """Move the running statistics by each group's, in order."""
    unbiased = var * (total / (total - 1))
    for m, v in zip(mean, unbiased, strict=True):
        running_mean.lerp_(m.to(running_mean.dtype), momentum)
        running_var.lerp_(v.to(running_var.dtype), momentum)
    num_batches_tracked.add_(len(mean))
