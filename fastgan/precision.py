"""Mixed precision: the network that computes in 16 bits, and the scale of float16's losses."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastgan_kernels import BatchNormAct2d

from .models import SpectralNorm

Network = TypeVar("Network", bound=nn.Module)

# torch.amp.GradScaler's: where the scale starts, and what it does after an overflow and after this
# many steps without one.
SCALE, BACKOFF, GROWTH, INTERVAL = 2.0**16, 0.5, 2.0, 2000


def low_copy(network: Network, dtype: torch.dtype) -> Network:
    """`network` with the weights of its layers in `dtype`, to compute with.

    Its batch norms are the network's own: their parameters and statistics stay float32; so are the
    singular vectors of its spectral norms. The weights are leaves, which backward reaches; nothing
    keeps them equal to the network's but what writes them (`fastgan_kernels.Adam`).
    """
    norms = [m for m in network.modules() if isinstance(m, BatchNormAct2d | SpectralNorm)]
    low = copy.deepcopy(network, {id(norm): norm for norm in norms})
    shared = {id(p) for norm in norms for p in norm.parameters()}
    for p in low.parameters():
        if id(p) not in shared:
            p.data = p.data.to(dtype)
    return low


class LossScale:
    """The scale of float16's losses: torch.amp.GradScaler's rule without its branches on the host,
    so that a captured step follows it too. Disabled, it does nothing.

    Attributes:
        scale: 0-d float32.
        skipped: 0-d int64, steps that an optimizer has skipped for an overflow.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), SCALE if enabled else 1.0, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        # without an overflow, since the last change
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._skips: list[Tensor] = []  # of this step

    def gradient(self, loss: Tensor) -> Tensor:
        """The scaled loss's by the loss, 0-d: what `torch.autograd.grad` is given to begin with, so
        that neither the product nor its gradient is a launch.
        """
        return self.scale.to(loss.dtype)

    def note(self, skipped: Tensor) -> None:
        """That an optimizer has skipped its step (1) or not (0), 0-d float32."""
        if self.enabled:
            self._skips.append(skipped)

    def update(self, frozen: Tensor) -> None:
        """After both optimizers: halve after an overflow, double after 2,000 steps without; stay
        where `frozen` (0-d, 1 or 0) is not 0.
        """
        if not self.enabled:
            return
        found = torch.stack(self._skips).amax()
        self._skips.clear()
        state = (self.scale, self._good_steps)
        before = [t.clone() for t in state]
        torch._amp_update_scale_(*state, found, GROWTH, BACKOFF, INTERVAL)
        for t, was in zip(state, before, strict=True):
            t.copy_(torch.where(frozen > 0, was, t))
        self.skipped += ((found > 0) & (frozen == 0)).to(self.skipped.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        if not self.enabled:
            return {}
        return {"scale": self.scale, "good_steps": self._good_steps, "skipped": self.skipped}
