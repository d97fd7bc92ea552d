"""Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957): a weight divided by the largest
singular value of its matrix, which power iteration follows from step to step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST_ITERATIONS = 15  # before the first use, as torch.nn.utils.parametrizations.spectral_norm


class SpectralNorm(nn.Module):
    """W / sigma for a weight of shape [out, ...], its matrix W [out, rest] of the largest singular
    value sigma = u^T W v; the buffers u [out] and v [rest] are float32 (float64 after `double()`).

    A step calls `iterate` once, on the weight as it is kept; `forward` changes nothing, so that any
    number of passes see one sigma. `reset` must come before the first use, or a state_dict: u is 0
    until then.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight_shape: torch.Size | tuple[int, ...]) -> None:
        super().__init__()
        shape = torch.Size(weight_shape)
        self.register_buffer("u", torch.zeros(shape[0]))
        self.register_buffer("v", torch.zeros(shape[1:].numel()))

    @torch.no_grad()
    def reset(self, weight: Tensor, random: torch.Generator) -> None:
        """Draw u, and follow this weight for 15 iterations."""
        self.u.copy_(F.normalize(self.u.normal_(generator=random), dim=0))
        for _ in range(FIRST_ITERATIONS):
            self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One power iteration, in place and in the buffers' precision (algorithm 1)."""
        matrix = weight.flatten(1).to(self.u.dtype)
        self.v.copy_(F.normalize(torch.mv(matrix.T, self.u), dim=0))
        self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """weight / sigma in the weight's type and memory format, sigma in float32 at least; its
        gradient goes through sigma, with u and v as constants (eq. 12).
        """
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, v = self.u.to(wide.dtype), self.v.to(wide.dtype)
        sigma = torch.dot(u, torch.mv(wide.flatten(1), v))
        return (wide / sigma).to(weight.dtype)
