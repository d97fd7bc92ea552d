"""`bn_act` as a module, in the place of `nn.BatchNorm2d` and the activation behind it."""

import torch
from torch import Tensor, nn

from ._launch import IMPLS
from .bn_act import bn_act, check_options
from .bn_act_plain import Reduce


class BatchNormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` and the activation behind it; parameters, buffers and state_dict are
    `nn.BatchNorm2d`'s.

    `forward(x, groups)` counts each group as one tracked batch, as `groups` separate calls would.
    `reduce` may be set at any time, to normalise by the statistics of all processes (see `bn_act`).
    What takes it for a plain `nn.BatchNorm2d` loses the activation:
    `nn.SyncBatchNorm.convert_sync_batchnorm` (set `reduce`), `fuse_conv_bn_eval` (use `folded`).

    Args:
        num_features: channels, C.
        act, negative_slope, impl: `bn_act`'s.
        eps, momentum: `nn.BatchNorm2d`'s; a cumulative average (momentum None) is not there.

    Raises:
        ValueError: an option out of range.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        act: str = "relu",
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        impl: str = "auto",
    ) -> None:
        check_options("BatchNormAct2d", momentum, eps, act, negative_slope)
        if impl not in IMPLS:
            raise ValueError(
                f"BatchNormAct2d: impl must be one of {', '.join(IMPLS)}, got {impl!r}"
            )
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.act, self.negative_slope, self.impl = act, negative_slope, impl
        self.reduce: Reduce | None = None

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        return bn_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,  # type: ignore[arg-type]  # None is refused there
            eps=self.eps,
            act=self.act,
            negative_slope=self.negative_slope,
            groups=groups,
            num_batches_tracked=self.num_batches_tracked,
            reduce=self.reduce,
            impl=self.impl,
        )

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), [C] each: in evaluation y = act(x * scale + shift), which a convolution
        before it can take into its weight and bias.
        """
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}, negative_slope={self.negative_slope}"
