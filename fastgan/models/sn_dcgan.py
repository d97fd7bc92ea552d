"""The DCGAN's discriminator with spectral norm in place of batch norm (Miyato et al. 2018,
arXiv:1802.05957): every convolution's weight is divided by its largest singular value.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan_kernels import conv4x4

from ..config import split_size
from .dcgan import LEAKY_SLOPE, channels, convolutions_beside
from .spectral import SpectralNorm


class SpectralDown(nn.Module):
    """Convolution that halves the map, by a weight of spectral norm 1; bias, LeakyReLU."""

    def __init__(self, cin: int, cout: int, conv_impl: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 4, 2, 1)
        self.spectral = SpectralNorm(self.conv.weight.shape)
        self.conv_impl = conv_impl

    def forward(self, x: Tensor) -> Tensor:
        x = conv4x4(x, self.spectral(self.conv.weight), impl=self.conv_impl)
        assert self.conv.bias is not None
        return F.leaky_relu(x + self.conv.bias[:, None, None], LEAKY_SLOPE)


class SpectralDiscriminator(nn.Module):
    """Images [B, 3, size, size] to logits [B]; `groups` changes nothing, since nothing is
    normalised over the batch. `impl` and `conv_impl` as in `dcgan.Discriminator`.
    """

    arch = "dcgan"

    def __init__(
        self, size: int = 64, width: int = 64, impl: str = "auto", conv_impl: str | None = None
    ) -> None:
        super().__init__()
        base, _ = split_size(size)
        inner = [3, *channels(size, width)[::-1]]
        conv_impl = conv_impl or convolutions_beside(impl)
        self.size, self.width, self.conv_impl = size, width, conv_impl
        self.blocks = nn.ModuleList(
            SpectralDown(cin, cout, conv_impl) for cin, cout in zip(inner, inner[1:], strict=False)
        )
        self.last = nn.Conv2d(inner[-1], 1, base, 1, 0)
        self.spectral = SpectralNorm(self.last.weight.shape)

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.spectral(self.last.weight)))
        return F.linear(x, weight, self.last.bias).flatten()

    def reset(self, random: torch.Generator) -> None:
        """Draw the singular vectors, once the weights are what they are to begin with."""
        for norm, weight in self._norms():
            norm.reset(weight, random)

    def iterate(self) -> None:
        """One power iteration of each weight's singular vectors; a step begins with it."""
        for norm, weight in self._norms():
            norm.iterate(weight)

    def _norms(self) -> Iterator[tuple[SpectralNorm, Tensor]]:
        for module in self.modules():
            if isinstance(module, SpectralDown):
                yield module.spectral, module.conv.weight
        yield self.spectral, self.last.weight
