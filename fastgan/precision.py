"""Mixed precision: the network that computes in 16 bits, and the scale of float16's losses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastgan_kernels import BatchNormAct2d

Network = TypeVar("Network", bound=nn.Module)

# torch.amp.GradScaler's: where the scale starts, and what it does after an overflow and after this
# many steps without one.
SCALE, BACKOFF, GROWTH, INTERVAL = 2.0**16, 0.5, 2.0, 2000


def low_copy(network: Network, dtype: torch.dtype) -> Network:
    """`network` with the weights of its convolutions in `dtype`, to compute with.

    Its batch norms are the network's own: their parameters and statistics stay float32. The weights
    are leaves, which backward reaches; nothing keeps them equal to the network's but what writes
    them (`fastgan_kernels.Adam`).
    """
    norms = [m for m in network.modules() if isinstance(m, BatchNormAct2d)]
    low = copy.deepcopy(network, {id(norm): norm for norm in norms})
    shared = {id(p) for norm in norms for p in norm.parameters()}
    for p in low.parameters():
        if id(p) not in shared:
            p.data = p.data.to(dtype)
    return low


class LossScale:
    """The scale of float16's losses: torch.amp.GradScaler's rule without its branches on the host,
    so that a captured step follows it too. Disabled, it does nothing.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), SCALE if enabled else 1.0, device=device)
        # without an overflow, since the last change
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._one = torch.ones((), device=device)
        self._overflows: list[Tensor] = []  # of this step

    def __call__(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * self.scale if self.enabled else loss

    def check(self, grads: Sequence[Tensor]) -> Tensor | None:
        """1 where a gradient is not finite, and its optimizer has to skip the step, else 0: 0-d
        float32. None when disabled. One more pass over the gradients, which float16 alone pays.
        """
        if not self.enabled:
            return None
        found = torch.zeros_like(self.scale)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for g in grads:
            by_dtype.setdefault(g.dtype, []).append(g)
        for same in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(same, found, self._one)
        self._overflows.append(found)
        return found

    def update(self) -> None:
        """After both optimizers: halve after an overflow, double after 2,000 steps without."""
        if self.enabled:
            found = torch.stack(self._overflows).amax()
            torch._amp_update_scale_(self.scale, self._good_steps, found, GROWTH, BACKOFF, INTERVAL)
            self._overflows.clear()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self._good_steps} if self.enabled else {}
