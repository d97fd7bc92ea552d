"""What trains a network: Adam with everything on the device, the copy that computes in 16 bits, the
averaged generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic

import torch
from torch import Tensor

from fastgan_kernels import Adam, Average
from fastgan_kernels.adam import MOMENTS

from .models import AnyGenerator
from .precision import Network, low_copy

# The average's half-life is at most this share of the images seen (StyleGAN2-ADA's ema_rampup).
RAMP = 0.05


class Trained(Generic[Network]):
    """A network with what trains it.

    Attributes:
        network: its weights as they are kept and averaged, float32 (or float64).
        working: what computes: the network itself, or a copy with weights of 16 bits, which Adam
            writes after each step. Its gradients are what Adam takes.
        adam: over the network's parameters, its state made at once and its learning rate a tensor
            on the device: nothing is left to be allocated or branched on in the first step, and a
            schedule writes into `adam.param_groups[0]["lr"]` without touching a captured graph.
    """

    def __init__(
        self,
        network: Network,
        lr: float,
        betas: tuple[float, float],
        *,
        low: torch.dtype | None = None,
        ema: Ema | None = None,
        impl: str = "torch",
    ) -> None:
        """`low` is the 16-bit type to compute in; `ema` is moved by Adam, which is fastgan's kernel
        with impl "triton" and PyTorch's fused one with "torch".
        """
        self.network = network
        self.working = network if low is None else low_copy(network, low)
        params, used = list(network.parameters()), self.working.parameters()
        copies = [w if w is not p else None for p, w in zip(params, used, strict=True)]
        self.adam = Adam(
            params,
            lr,
            betas,
            low=copies if low is not None else (),
            average=ema.average if ema is not None else None,
            impl=impl,
        )

    def state(self) -> dict[str, Tensor]:
        """Adam's state by parameter name: `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq`."""
        return {
            f"{name}.{key}": self.adam.state[p][key]
            for name, p in self.network.named_parameters()
            for key in ("step", *MOMENTS)
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
        """Copy a network's state_dict and Adam's `state()` in, and into the working copy.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        copy_into(self.network.state_dict(), weights, what)
        copy_into(self.state(), state, f"Adam of {what}")
        self.adam.write_low()

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        copies = [copy.detach() for copy in self.adam.low if copy is not None]
        return [*self.network.state_dict().values(), *self.state().values(), *copies]


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into those in use, in place and in their own memory layout.

    Raises:
        ValueError: a name is missing or left over, or a shape differs.
    """
    wrong = sorted(set(target) ^ set(saved))
    wrong += [n for n in target if n in saved and target[n].shape != saved[n].shape]
    if wrong:
        raise ValueError(f"{what}: tensors that do not fit: {', '.join(wrong[:4])}")
    for name, tensor in target.items():
        tensor.copy_(saved[name])


class Ema:
    """The exponential moving average of a generator, which samples are drawn from.

    After each step every floating-point parameter *and* batch-norm buffer moves towards the
    generator's by 1 - 0.5 ** (batch / half_life): the running statistics are averaged with the
    weights they belong to, over the same steps. The integer buffer is copied. In evaluation the
    averaged generator normalises by these averaged statistics. While few images have been seen the
    half-life is 5% of them, so that the first weights are soon forgotten.
    """

    def __init__(
        self, source: AnyGenerator, average: AnyGenerator, batch: int, half_life_img: float
    ) -> None:
        """`average` is a second generator like `source`, of which it becomes a copy."""
        self.network = average.requires_grad_(False)
        copy_into(average.state_dict(), source.state_dict(), "Ema")
        params = list(average.parameters())
        buffers = list(zip(source.buffers(), average.buffers(), strict=True))
        self._counts = [pair for pair in buffers if not pair[0].is_floating_point()]
        # On the device and advanced there, so that a captured step averages as a plain one does.
        self.steps = torch.zeros((), dtype=torch.float64, device=params[0].device)
        self.average = Average(
            params=params,
            buffers=[pair for pair in buffers if pair[0].is_floating_point()],
            step=self.steps,
            half_life=half_life_img / batch,
            ramp=RAMP,
        )

    @torch.no_grad()
    def copy_counts(self) -> None:
        """The integer buffers, after a step of the generator; Adam has moved all else."""
        if not self._counts:  # nothing is normalised by the batch
            return
        theirs, ours = zip(*self._counts, strict=True)
        torch._foreach_copy_(ours, theirs)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        return [*self.network.state_dict().values(), self.steps]
