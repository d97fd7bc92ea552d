"""The adversarial step: one update of D and one of G, on static buffers, with nothing read back to
the host.

The order is the reference's (`reference.py`): D on real, G once, D on the fake, Adam on D; D again
on the same fake with its new weights, Adam on G. Real and fake go through D in one pass of 2B
images with statistics of their own (`groups=2`), running statistics real first: the same function
as two passes. In the G step D is frozen in that it gets no weight gradients; it stays in training
mode, and its running statistics move a third time.

In mixed precision the networks' working copies compute (`optim.Trained`): weights are cast once a
step, by Adam, and not in every pass. Every operation is on the device and of a fixed shape, and
whatever changes from step to step is a tensor: the whole of it can be captured as a CUDA graph
(`graph.py`).

Of several processes each takes its share of the batch: all draw the whole batch's latents and flips
and use their rows, and each network's gradients are averaged before its Adam (`distributed.py`).
What is not finite changes nothing (`health.py`).

With R1 a step may carry the penalty: it is computed by float32's own network and PyTorch's own
operators, which can be differentiated twice, and its gradient is added to D's. It is that at real
images as D sees them, augmented and with noise: D's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan_kernels import BatchNormAct2d, gather_u8

from .compiling import compiled
from .config import PixelRange
from .data.feed import Batch
from .distributed import Mean, Ranks, sum_over_ranks
from .health import Health
from .losses import Objective
from .models import AnyDiscriminator, AnyGenerator, SpectralDiscriminator
from .optim import Ema, Trained
from .penalty import plain, r1
from .precision import LossScale
from .sight import AGAIN, FAKE, REAL, Sight

ALIGNED_BYTES = 16  # of a row that tensor cores load whole


class StepStats(NamedTuple):
    """0-d tensors on the device: the two losses, mean D(x), and mean D(G(z)) before D's update, as
    probabilities.
    """

    d_loss: Tensor
    g_loss: Tensor
    d_real: Tensor
    d_fake: Tensor


class Step:
    """One update of both networks, in place.

    Args:
        g, d: the networks with what trains them, in training mode.
        ema: the averaged generator that G's Adam moves; None for none.
        batch: images a step, B, of all ranks together.
        random: the generator that latents, flips and what D's sight needs are drawn from, on the
            networks' device.
        objective: what the two minimise (default: the non-saturating losses).
        sight: what D sees of an image; None: the image.
        penalty: the weight of the mean squared gradient of D at what it sees of real images, in
            the steps that carry it.
        flip: mirror each real image left to right with probability 1/2.
        one_pass: real and fake through D together; False for two passes, which is the same
            function.
        compile: compile the three passes (G, D's objective, G's objective) with torch.compile. A
            graph break or a reached recompile limit is then an error of torch._dynamo.
        impl: the image gather's and the watch's, "triton" or "torch"; networks and optimizers have
            their own.
        ranks: the processes that share the batch.
        sync_bn: batch norm over the whole batch, not over each rank's share.
    """

    def __init__(
        self,
        g: Trained[AnyGenerator],
        d: Trained[AnyDiscriminator],
        ema: Ema | None,
        *,
        batch: int,
        random: torch.Generator,
        objective: Objective | None = None,
        sight: Sight | None = None,
        penalty: float = 0.0,
        pixel_range: PixelRange = (-1.0, 1.0),
        flip: bool = False,
        one_pass: bool = True,
        compile: bool = False,
        impl: str = "auto",
        ranks: Ranks | None = None,
        sync_bn: bool = False,
    ) -> None:
        weight = next(g.working.parameters())
        self.g, self.d, self.ema = g, d, ema
        self.random, self.pixel_range = random, pixel_range
        self.objective = objective or Objective()
        self.sight, self.penalty = sight, penalty
        self.one_pass, self.impl = one_pass, impl
        self.dtype, self.device = weight.dtype, weight.device
        self.scale = LossScale(self.device, self.dtype == torch.float16)
        kept = next(g.network.parameters()).dtype
        self.latents = torch.empty(batch, g.network.latent, dtype=kept, device=self.device)
        self.flips = torch.empty(batch, device=self.device) if flip else None
        self.ranks = ranks = ranks or Ranks()
        self._share = ranks.share_of(batch)
        mine = self.latents[self._share]
        self._z = mine if kept == self.dtype else self._aligned(mine.shape)
        self.health = Health({"d": d, "g": g}, self.scale, impl)
        # what comes along: D's loss, D(x) and D(G(z)); G's loss
        leaves = {"d": (d.adam.leaves(), 3), "g": (g.adam.leaves(), 1)}
        shared = leaves.items() if ranks.world > 1 else ()
        self._means = {name: Mean(ranks, *which) for name, which in shared}
        if sync_bn and ranks.world > 1:
            for network in (g.network, d.network):  # the working copies have the same batch norms
                for module in network.modules():
                    if isinstance(module, BatchNormAct2d):
                        module.reduce = sum_over_ranks
        if compile:
            for part in ("_make", "_judge", "_fool"):
                setattr(self, part, compiled(getattr(self, part)))

    def __call__(self, batch: Batch, penalised: bool = False) -> StepStats:
        """Update D, then G, on `batch` (this rank's share of B images of the resident set) and
        fresh latents; `penalised`: with R1.
        """
        self.health.begin()
        if isinstance(self.d.network, SpectralDiscriminator):
            self.d.network.iterate()
        real = gather_u8(
            batch.images,
            batch.index,
            self._draw_flips(),
            dtype=self.dtype,
            value_range=self.pixel_range,
            impl=self.impl,
        )
        self.draw_latents()
        self._draw_sight()
        mine = self.latents[self._share]
        if self.dtype != mine.dtype:
            mine = self._z.copy_(mine)
        fake = self._make(mine)
        d_loss, d_real, d_fake = self._update_d(real, fake.detach(), penalised)
        g_loss = self._update_g(fake)
        self.scale.update(self.health.bad)
        if self.ema is not None:
            self.ema.copy_counts()
        return StepStats(d_loss, g_loss, d_real, d_fake)

    def draw(self) -> None:
        """Draw what a step draws, in its order."""
        self._draw_flips()
        self.draw_latents()
        self._draw_sight()

    def draw_latents(self) -> None:
        """Fill the static latents [B, latent] from N(0, 1) or U(-1, 1)."""
        if self.g.network.latent_dist == "uniform":
            self.latents.uniform_(-1, 1, generator=self.random)
        else:
            self.latents.normal_(generator=self.random)

    def _draw_sight(self) -> None:
        if self.sight is not None:
            self.sight.draw(self.random)

    def _draw_flips(self) -> Tensor | None:
        """bool [share], which images to mirror."""
        if self.flips is None:
            return None
        return self.flips.uniform_(generator=self.random)[self._share] < 0.5

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes and a later one reads."""
        average = self.ema.tensors() if self.ema is not None else []
        watched = [*self.scale.tensors().values(), *self.health.tensors()]
        return [*self.g.tensors(), *self.d.tensors(), *average, *watched]

    # The three passes, each a function of tensors alone: what --compile compiles.

    def _make(self, latents: Tensor) -> Tensor:
        return self.g.working(latents)

    def _judge(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """D's loss, mean D(x) and mean D(G(z))."""
        real, fake = self._seen(real, REAL), self._seen(fake, FAKE)
        if self.one_pass:
            on_real, on_fake = self._logits(torch.cat([real, fake]), 2).chunk(2)
        else:
            on_real, on_fake = self._logits(real, 1), self._logits(fake, 1)
        d_real, d_fake = (
            self.objective.probability(logits.detach()).mean() for logits in (on_real, on_fake)
        )
        return self.objective.d(on_real, on_fake), d_real, d_fake

    def _fool(self, fake: Tensor) -> Tensor:
        """G's loss."""
        return self.objective.g(self._logits(self._seen(fake, AGAIN), 1))

    def _logits(self, images: Tensor, groups: int) -> Tensor:
        return self.d.working(images, groups)

    def _seen(self, images: Tensor, look: int) -> Tensor:
        return images if self.sight is None else self.sight(images, look)

    def _update_d(self, real: Tensor, fake: Tensor, penalised: bool) -> tuple[Tensor, ...]:
        loss, d_real, d_fake = self._judge(real, fake)
        added = self._penalty_grads(real) if penalised else ()
        return self._descend(loss, "d", self.d, d_real, d_fake, added=added)

    def _penalty_grads(self, real: Tensor) -> tuple[Tensor, ...]:
        """Of the penalty, for every parameter of D, in the type that weights are kept in."""
        network = self.d.network
        seen = self._seen(real, REAL).to(self.latents.dtype)
        with plain(network):
            penalty = self.penalty * r1(network, seen)
            # where D is made of ReLUs alone, a bias has no part in its gradient
            grads = torch.autograd.grad(
                penalty,
                list(network.parameters()),
                self.scale.gradient(penalty),
                materialize_grads=True,
            )
        return grads

    def _update_g(self, fake: Tensor) -> Tensor:
        with without_gradients(self.d.working):
            loss = self._fool(fake)
        return self._descend(loss, "g", self.g)[0]

    def _descend(
        self,
        loss: Tensor,
        name: str,
        side: Trained[Any],
        *numbers: Tensor,
        added: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One update of a network by the loss's gradients and those `added`; returns loss and
        numbers, of the whole batch.
        """
        leaves = side.adam.leaves()
        # not backward(), which may copy a gradient to accumulate it, and on a stream of its own
        grads = torch.autograd.grad(loss, leaves, self.scale.gradient(loss))
        if added:
            grads = tuple(a + b.to(a.dtype) for a, b in zip(grads, added, strict=True))
        numbers = (loss.detach(), *numbers)
        if self._means:
            numbers = self._means[name](grads, numbers)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        side.adam.found_inf = self.health.check(name, numbers[0], grads)
        if side is self.g:
            self.health.end()  # before Adam moves the average, of running statistics, too
        if self.scale.enabled:
            side.adam.grad_scale = self.scale.scale
        side.adam.step()
        return numbers

    def _aligned(self, shape: torch.Size) -> Tensor:
        """[B, latent] in the working type, each row beginning on 16 bytes."""
        unit = ALIGNED_BYTES // self.dtype.itemsize
        rows = torch.empty(shape[0], -(-shape[1] // unit) * unit, dtype=self.dtype)
        return rows.to(self.device)[:, : shape[1]]


@contextmanager
def without_gradients(network: nn.Module) -> Iterator[None]:
    """No gradients for the network's parameters from what is computed inside."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
