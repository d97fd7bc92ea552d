"""What the two networks minimise, on logits, in float32 at least."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Loss


@dataclass(frozen=True)
class Objective:
    """The losses of both networks, from logits [B] of any floating type, and what a logit says.

        loss             D, a mean over real plus one over fake    G, a mean over fake
        non-saturating   -log D(x) - log(1 - D(G(z)))              -log D(G(z))
        minimax          the same                                  log(1 - D(G(z)))
        hinge            max(0, 1 - real) + max(0, 1 + fake)       -fake
        least-squares    (real - 1)^2 / 2 + fake^2 / 2             (fake - 1)^2 / 2

    D(x) is the sigmoid of the logit in the first two. Sources: Goodfellow et al. 2014, eq. 1 and
    section 3; Lim and Ye 2017 (arXiv:1705.02894); Mao et al. 2017 (arXiv:1611.04076), eq. 9, a = 0,
    b = c = 1.

    Attributes:
        label_smoothing: s, from 0: the target of real images alone is 1 - s in D's loss (Salimans
            et al. 2016, section 3.4). Hinge has no targets.

    Raises:
        ValueError: hinge with label smoothing.
    """

    loss: Loss = "non-saturating"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss == "hinge" and self.label_smoothing:
            raise ValueError(
                f"Objective: label_smoothing must be 0 for hinge, got {self.label_smoothing:g}"
            )

    def d(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """D's loss, 0-d."""
        real, fake, s = widen(real_logits), widen(fake_logits), self.label_smoothing
        if self.loss == "hinge":
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        if self.loss == "least-squares":
            return (real - (1 - s)).square().mean() / 2 + fake.square().mean() / 2
        on_real = F.softplus(-real)
        if s:  # (1 - s) softplus(-x) + s softplus(x), whose difference is x
            on_real = on_real + s * real
        return on_real.mean() + F.softplus(fake).mean()

    def g(self, fake_logits: Tensor) -> Tensor:
        """G's loss, 0-d."""
        fake = widen(fake_logits)
        if self.loss == "hinge":
            return -fake.mean()
        if self.loss == "least-squares":
            return (fake - 1).square().mean() / 2
        if self.loss == "minimax":
            return -F.softplus(fake).mean()
        return F.softplus(-fake).mean()

    def probability(self, logits: Tensor) -> Tensor:
        """[B], of being real: the sigmoid (for hinge by convention); for least-squares the logit,
        held to 0 to 1, as the best D is p / (p + q) itself (Mao et al. 2017, eq. 5). Of smoothed
        targets it is 1 - s of that.
        """
        wide = widen(logits)
        return wide.clamp(0, 1) if self.loss == "least-squares" else wide.sigmoid()

    @property
    def threshold(self) -> float:
        """The logit above which D says "real": the best one's where p = q, (1 - s) / 2 as a
        probability.
        """
        s = self.label_smoothing
        if self.loss == "least-squares":
            return (1 - s) / 2
        return math.log((1 - s) / (1 + s))


def widen(logits: Tensor) -> Tensor:
    """float32, or float64 as it is: what means and exponentials are taken in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
