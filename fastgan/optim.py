"""Adam with everything on the device, and the averaged generator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import fastgan_kernels as kernels
from fastgan_kernels.adam import MOMENTS

from .models import Generator

# The average's half-life is at most this share of the images seen (StyleGAN2-ADA's ema_rampup).
RAMP = 0.05


Adam = torch.optim.Adam | kernels.Adam


def make_adam(
    network: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    impl: str = "torch",
    ema: Ema | None = None,
) -> Adam:
    """Adam over a network, its state made at once and its learning rate a tensor on the device:
    torch's fused one ("torch"), or fastgan's ("triton"), which then moves `ema` in the same launch.

    Nothing is then left to be allocated or branched on in the first step, and a schedule can write
    a new learning rate into `param_groups[0]["lr"]` without touching a captured graph.
    """
    params = list(network.parameters())
    if impl == "triton":
        if ema is not None:
            ema.moved_by_adam = True
        average = ema.average if ema is not None else None
        return kernels.Adam(params, lr, betas, eps, average=average, impl=impl)
    lr_tensor = torch.tensor(lr, dtype=torch.float64, device="cpu").to(
        params[0].device, torch.promote_types(params[0].dtype, torch.float32)
    )
    adam = torch.optim.Adam(
        params, lr=lr_tensor, betas=betas, eps=eps, fused=True, capturable=params[0].is_cuda
    )
    for p in params:
        adam.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            **{name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in MOMENTS},
        }
    return adam


def adam_tensors(adam: Adam, network: nn.Module) -> dict[str, Tensor]:
    """Adam's state by parameter name: `NAME.step`, `NAME.exp_avg`, `NAME.exp_avg_sq`."""
    return {
        f"{name}.{key}": adam.state[p][key]
        for name, p in network.named_parameters()
        for key in ("step", *MOMENTS)
    }


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
        self, source: Generator, average: Generator, batch: int, half_life_img: float
    ) -> None:
        """`average` is a second generator like `source`, of which it becomes a copy."""
        self.network = average.requires_grad_(False)
        copy_into(average.state_dict(), source.state_dict(), "Ema")
        self._params = list(source.parameters())
        buffers = list(zip(source.buffers(), average.buffers(), strict=True))
        self._counts = [pair for pair in buffers if not pair[0].is_floating_point()]
        # On the device and advanced there, so that a captured step averages as a plain one does.
        self.steps = torch.zeros((), dtype=torch.float64, device=self._params[0].device)
        self.average = kernels.Average(
            params=list(average.parameters()),
            buffers=[pair for pair in buffers if pair[0].is_floating_point()],
            step=self.steps,
            half_life=half_life_img / batch,
            ramp=RAMP,
        )
        self.moved_by_adam = False  # whether the generator's Adam moves the average in its launch

    @torch.no_grad()
    def update(self) -> None:
        """Move the average after a step of the generator."""
        if not self.moved_by_adam:
            self.average.move(self._params)
        for theirs, ours in self._counts:
            ours.copy_(theirs)
