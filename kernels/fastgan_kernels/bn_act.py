"""Batch normalisation and its activation as one operator, with grouped statistics.

    y = act(weight * (x - mean_g) / sqrt(var_g + eps) + bias)

The batch is `groups` equal parts in order, each normalised by its own mean and biased variance
over (N/groups, H, W): the same function as one call a part. The running statistics are updated
part by part, in order, with the unbiased variance, as `nn.BatchNorm2d` does (Ioffe and Szegedy
2015, algorithm 1 and section 3.1).

    x, y                        [N, C, H, W] in float64, float32, bfloat16 or float16;
                                channels-last is the fast layout
    weight, bias,
    running_mean, running_var   [C] float32 (float64 beside a float64 x)

Statistics are computed in float32 at least, whatever x is stored in. One layer moves, per element
of x and counted in its storage type: forward 1 read for the statistics, 1 read and 1 write to
apply; backward 2 reads to reduce, 2 reads and 1 write to apply. What `F.batch_norm` followed by an
activation really moves is more, and depends on the backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTS = ("relu", "leaky_relu", "none")
IMPLS = ("auto", "torch", "ref")


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
        parts.append(_act(z, act, negative_slope).to(x.dtype))
    return torch.cat(parts)


def _act(z: Tensor, act: str, negative_slope: float) -> Tensor:
    if act == "relu":
        return F.relu(z)
    if act == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return z


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
    for part in x.chunk(groups):
        z = F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        if act == "relu":
            z = F.relu_(z)
        elif act == "leaky_relu":
            z = F.leaky_relu_(z, negative_slope)
        parts.append(z)
    return parts[0] if groups == 1 else torch.cat(parts)


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
    impl: str = "auto",
) -> Tensor:
    """Batch norm and activation over [N, C, H, W]; see the top of this file.

    Args:
        training: normalise by the batch and update the running statistics in place; else by the
            running statistics.
        momentum: the weight of the new statistics, 0 to 1.
        act: "relu", "leaky_relu" (with `negative_slope`) or "none".
        groups: how many equal parts of the batch have statistics of their own.
        impl: "torch" calls `F.batch_norm`, "ref" the definition; "auto" is "torch".

    Raises:
        ValueError: a shape, option or group count that does not fit, or a part of a single value a
            channel.
    """
    _check(x, weight, bias, running_mean, running_var, training, act, groups, impl)
    run = bn_act_ref if impl == "ref" else _bn_act_torch
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


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    act: str,
    groups: int,
    impl: str,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"bn_act: x must have 4 dimensions [N, C, H, W], got {tuple(x.shape)}")
    if act not in ACTS:
        raise ValueError(f"bn_act: act must be one of {', '.join(ACTS)}, got {act!r}")
    if impl not in IMPLS:
        raise ValueError(f"bn_act: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    count, channels = x.shape[0], x.shape[1]
    named = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in named.items():
        if tuple(vector.shape) != (channels,):
            got = tuple(vector.shape)
            raise ValueError(f"bn_act: {name} must have shape ({channels},), got {got}")
    if groups < 1 or count % groups:
        raise ValueError(f"bn_act: groups must divide the batch of {count} evenly, got {groups}")
    if training and (count // groups) * x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            "bn_act: training needs at least 2 values a channel in each group, got x of shape "
            f"{tuple(x.shape)} in {groups} groups"
        )


class BatchNormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` and the activation behind it; parameters, buffers and state_dict are
    `nn.BatchNorm2d`'s.

    `forward(x, groups)` counts each group as one tracked batch, as `groups` separate calls would.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        act: str = "relu",
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        impl: str = "auto",
    ) -> None:
        if momentum is None:
            raise ValueError("BatchNormAct2d: momentum must be a number from 0 to 1, got None")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.act, self.negative_slope, self.impl = act, negative_slope, impl

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(groups)
        return bn_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum or 0.0,
            eps=self.eps,
            act=self.act,
            negative_slope=self.negative_slope,
            groups=groups,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}, negative_slope={self.negative_slope}"
