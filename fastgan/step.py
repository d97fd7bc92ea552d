"""The adversarial step: one update of D and one of G, on static buffers, with nothing read back to
the host.

The order is the reference's (`reference.py`): D on real, G once, D on the fake, Adam on D; D again
on the same fake with its new weights, Adam on G. Real and fake go through D in one pass of 2B
images with statistics of their own (`groups=2`), running statistics real first: the same function
as two passes. In the G step D is frozen in that it gets no weight gradients; it stays in training
mode, and its running statistics move a third time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgan_kernels import gather_u8

from .config import PixelRange
from .data.feed import Batch
from .losses import d_non_saturating, g_non_saturating, widen
from .models import Discriminator, Generator
from .optim import Adam, Ema


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
        generator, discriminator: the networks, in training mode; their dtype is that of the
            weights.
        adam_g, adam_d: their optimizers.
        ema: the averaged generator, moved after G's update; None for none.
        batch: images a step, B.
        random: the generator that latents are drawn from, on the networks' device.
        amp_dtype: bfloat16 or float16 for mixed precision by autocast; None computes in the
            weights' dtype. float16 scales the losses and skips an update whose gradients overflow
            (torch.amp.GradScaler).
        one_pass: real and fake through D together; False for two passes, which is the same
            function.
        compile: compile both networks with torch.compile.
        impl: the image gather's, "triton" or "torch"; networks and optimizers have their own.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        adam_g: Adam,
        adam_d: Adam,
        ema: Ema | None,
        *,
        batch: int,
        random: torch.Generator,
        pixel_range: PixelRange = (-1.0, 1.0),
        amp_dtype: torch.dtype | None = None,
        one_pass: bool = True,
        compile: bool = False,
        impl: str = "auto",
    ) -> None:
        weight = next(generator.parameters())
        self.generator, self.discriminator = generator, discriminator
        self.adam_g, self.adam_d, self.ema = adam_g, adam_d, ema
        self.batch, self.random, self.pixel_range = batch, random, pixel_range
        self.amp_dtype, self.one_pass, self.impl = amp_dtype, one_pass, impl
        self.dtype = amp_dtype or weight.dtype
        self.device = weight.device
        self.latents = torch.empty(
            batch, generator.latent, dtype=weight.dtype, device=weight.device
        )
        self.scaler = torch.amp.GradScaler(weight.device.type, enabled=amp_dtype == torch.float16)
        self._g: Callable[..., Tensor] = generator
        self._d: Callable[..., Tensor] = discriminator
        if compile:
            self._g = torch.compile(generator, dynamic=False)
            self._d = torch.compile(discriminator, dynamic=False)

    def __call__(self, batch: Batch) -> StepStats:
        """Update D, then G, on `batch` (B images of the resident set) and fresh latents."""
        real = gather_u8(
            batch.images,
            batch.index,
            dtype=self.dtype,
            value_range=self.pixel_range,
            impl=self.impl,
        )
        self.draw_latents()
        with self._autocast():
            fake = self._g(self.latents)
        d_loss, d_real, d_fake = self._update_d(real, fake.detach())
        g_loss = self._update_g(fake)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        return StepStats(d_loss, g_loss, d_real, d_fake)

    def draw_latents(self) -> None:
        """Fill the static latents [B, latent] from N(0, 1)."""
        self.latents.normal_(generator=self.random)

    def _update_d(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self._autocast():
            if self.one_pass:
                logits = self._d(torch.cat([real, fake.to(real.dtype)]), 2)
                on_real, on_fake = logits.chunk(2)
            else:
                on_real, on_fake = self._d(real, 1), self._d(fake, 1)
        loss = d_non_saturating(on_real, on_fake)
        self._descend(loss, self.adam_d)
        d_real, d_fake = (widen(logits.detach()).sigmoid().mean() for logits in (on_real, on_fake))
        return loss.detach(), d_real, d_fake

    def _update_g(self, fake: Tensor) -> Tensor:
        with self._frozen(self.discriminator), self._autocast():
            loss = g_non_saturating(self._d(fake, 1))
        self._descend(loss, self.adam_g)
        return loss.detach()

    def _descend(self, loss: Tensor, adam: Adam) -> None:
        adam.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(adam)

    def _autocast(self) -> torch.autocast:
        # no cache of cast weights: it cannot be captured in a graph
        return torch.autocast(
            self.device.type,
            dtype=self.amp_dtype,
            enabled=self.amp_dtype is not None,
            cache_enabled=False,
        )

    @staticmethod
    @contextmanager
    def _frozen(network: nn.Module) -> Iterator[None]:
        network.requires_grad_(False)
        try:
            yield
        finally:
            network.requires_grad_(True)
