"""What the two networks minimise, on logits, in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def d_non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    """-mean log D(x) - mean log(1 - D(G(z))), from logits [B]: the binary cross-entropy
    (Goodfellow et al. 2014, eq. 1).
    """
    return F.softplus(-widen(real)).mean() + F.softplus(widen(fake)).mean()


def g_non_saturating(fake: Tensor) -> Tensor:
    """-mean log D(G(z)), from logits [B]: the non-saturating form (Goodfellow et al. 2014, section
    3).
    """
    return F.softplus(-widen(fake)).mean()


def widen(logits: Tensor) -> Tensor:
    """float32, or float64 as it is: what means and exponentials are taken in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
