"""Whether the numbers are finite: seen on the device before an optimizer applies them, read by the
host once a tick.

From the first step whose loss or gradients are not finite on, nothing changes any more: weights,
moments, running statistics and the average stay those of the step before, until the host reads
`frozen` and ends the run with them. Where it was G's, D has taken its update of that step, which is
right, and keeps it. An overflow of float16's scaled gradients is no such step: its
optimizer skips it, the scale is lowered, and it is counted (`precision.LossScale`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan_kernels import guard

from .config import TrainConfig
from .optim import Trained
from .packing import packed_bytes, places
from .precision import LossScale

# A scale that has been halved so often says that it is not the scale.
LEAST_SCALE = 2.0**-16
ALIGNED_BYTES = 16  # Triton compiles other code for pointers to anything else


class Health:
    """The watch over both networks' steps.

    Attributes:
        bad: 0-d bool, true from the first step on that was not finite.
        frozen: 0-d int64, steps since then, that one included.
    """

    def __init__(
        self, sides: Mapping[str, Trained[Any]], scale: LossScale, impl: str = "auto"
    ) -> None:
        """`sides`: in the order of their updates; `scale`: of the losses; `impl`: `guard`'s."""
        device = scale.scale.device
        self._sides, self._scale, self._impl = sides, scale, impl
        self._last = list(sides)[-1]
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.frozen = torch.zeros((), dtype=torch.int64, device=device)
        # of the first step that was not finite: which parameters' gradients, the loss; else zeros
        self._flags = {
            name: torch.zeros(len(side.adam.leaves()), dtype=torch.int32, device=device)
            for name, side in sides.items()
        }
        self._losses = {name: torch.zeros((), device=device) for name in sides}
        self._found = {name: torch.zeros((), device=device) for name in sides}
        buffers = [b for side in sides.values() for b in side.network.buffers()]
        self._live = _side_by_side(buffers, device)
        self._before = torch.empty_like(self._live)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes and a later one reads."""
        return [self.bad, self.frozen, *self._flags.values(), *self._losses.values()]

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step: remember the running statistics, which its passes will move."""
        self._before.copy_(self._live)

    def check(self, name: str, loss: Tensor, grads: Sequence[Tensor]) -> Tensor:
        """1 where a network must not take its update, else 0: 0-d float32, until its next check.

        Args:
            loss: as it is, 0-d.
            grads: of every parameter, scaled.
        """
        found = self._found[name]
        guard(
            grads,
            loss,
            flags=self._flags[name],
            bad=self.bad,
            frozen=self.frozen,
            lost=self._losses[name],
            found=found,
            scale=self._scale.scale if self._scale.enabled else None,
            least=LEAST_SCALE,
            last=name == self._last,
            impl=self._impl,
        )
        self._scale.note(found)
        return found

    @torch.no_grad()
    def end(self) -> None:
        """When both have been checked, and before the average is moved."""
        torch.where(self.bad, self._before, self._live, out=self._live)

    def diagnosis(self) -> dict[str, Any]:
        """Once `bad`: what was met at that step, by network: its learning rate and, where its loss
        or a gradient was not finite, its loss and the layers whose gradients were not.
        """
        found: dict[str, Any] = {}
        for name, side in self._sides.items():
            found[name] = {"learning_rate": float(side.adam.param_groups[0]["lr"])}
            flags, loss = self._flags[name].tolist(), float(self._losses[name])
            if any(flags) or not _finite(loss):
                layers = [layer for layer, _ in side.network.named_parameters()]
                wrong = [layer for layer, flag in zip(layers, flags, strict=True) if flag]
                found[name] |= {"loss": loss, "not_finite": wrong}
        return found


def explain(diagnosis: Mapping[str, Any], saved: str, config: TrainConfig) -> str:
    """What happened and what to try, for the user; `saved`: where what was right is."""
    name, met = next(
        (name, met)
        for name, met in diagnosis["networks"].items()
        if met.get("not_finite") or not _finite(met.get("loss", 0.0))
    )
    where = f"{name.upper()}'s loss is {met['loss']:g}"
    if layers := met["not_finite"]:
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        where += f", and the gradient of its {layers[0]}{more} is not finite"
    rates = {key: net["learning_rate"] for key, net in diagnosis["networks"].items()}
    halved = " ".join(f"--lr-{key} {rate / 2:g}" for key, rate in sorted(rates.items()))
    remedies = [f"{halved} (half of what they were)"]
    if config.amp:
        remedies.append("--no-amp (float32)")
    return (
        f"step {diagnosis['step']:,} ({diagnosis['kimg']:g} kimg) was not finite, and was not "
        f"applied: {where}; {saved}; try {', or '.join(remedies)}"
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _side_by_side(buffers: Sequence[Tensor], device: torch.device) -> Tensor:
    """The memory that these tensors are moved into, one after the other, as int64 numbers: a single
    tensor, of which they stay the parts. Each begins on `ALIGNED_BYTES`.
    """
    whole = torch.zeros(packed_bytes(buffers, ALIGNED_BYTES), dtype=torch.uint8, device=device)
    for buffer, part in zip(buffers, places(whole, buffers, ALIGNED_BYTES), strict=True):
        part.copy_(buffer)
        # torch.compile refuses tensors of one storage that are views of it by several types: each
        # gets a storage of its own, on the same memory
        buffer.data = torch.from_dlpack(part)
    return whole.view(torch.int64)
