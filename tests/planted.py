"""Mistakes that a fast step could have: a check that lets one pass is none."""

import torch
from torch import Tensor

from fastgan.step import Step


class Ungrouped(Step):
    """Planted: real and fake normalised by shared statistics."""

    def _logits(self, images: Tensor, groups: int) -> Tensor:
        return super()._logits(images, 1)


class FakeFirst(Step):
    """Planted: the running statistics take the fake before the real."""

    def _logits(self, images: Tensor, groups: int) -> Tensor:
        if groups == 1:
            return super()._logits(images, 1)
        real, fake = images.chunk(2)
        on_fake, on_real = super()._logits(torch.cat([fake, real]), 2).chunk(2)
        return torch.cat([on_real, on_fake])


class EvalInG(Step):
    """Planted: D in evaluation mode while G is updated."""

    def _update_g(self, fake: Tensor) -> Tensor:
        self.d.working.eval()
        loss = super()._update_g(fake)
        self.d.working.train()
        return loss


class StaleD(Step):
    """Planted: G is judged by the discriminator from before its update."""

    def _update_d(self, real: Tensor, fake: Tensor, penalised: bool):
        self.old = [p.detach().clone() for p in self.d.working.parameters()]
        return super()._update_d(real, fake, penalised)

    def _update_g(self, fake: Tensor) -> Tensor:
        params = list(self.d.working.parameters())
        new = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, old in zip(params, self.old, strict=True):
                p.copy_(old)
        loss = super()._update_g(fake)
        with torch.no_grad():
            for p, value in zip(params, new, strict=True):
                p.copy_(value)
        return loss


class NotANumber(Step):
    """Planted: one running mean is NaN after each step."""

    def _update_g(self, fake: Tensor) -> Tensor:
        loss = super()._update_g(fake)
        self.d.network.blocks[-1].norm.running_mean[1] = torch.nan
        return loss
