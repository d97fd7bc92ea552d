"""The DCGAN of Radford et al. 2015 (arXiv:1511.06434) in the PyTorch tutorial's shape, for any
supported size.

The generator starts from a square of 4, 5, 6 or 7 pixels and doubles it until `size` is reached;
the discriminator is its mirror. Channels halve with every doubling, down to `width` beside the
image, and are held at 16 times `width`: at 64 px 8, 4, 2, 1 times the width, as in the tutorial;
at 256 px 16, 16, 8, 4, 2, 1. Both run in channels-last memory
(`Module.to(memory_format=torch.channels_last)`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan_kernels import BatchNormAct2d, conv4x4, conv4x4_runs, conv_transpose4x4
from fastgan_kernels.conv4x4_kernels import unfit

from ..config import LatentDist, PixelRange, split_size

LEAKY_SLOPE = 0.2
MAX_MULTIPLE = 16  # of the width: 1,024 channels at width 64, the common form of a 128 px DCGAN


def channels(size: int, width: int) -> list[int]:
    """Channels of the inner maps from the smallest one to the one beside the image."""
    _, doublings = split_size(size)
    return [width * min(2**i, MAX_MULTIPLE) for i in reversed(range(doublings))]


def convolutions_beside(impl: str) -> str:
    """The `impl` of convolutions beside that of batch norms: the kernels where they are faster, but
    none where PyTorch's own operators are asked for.
    """
    return "torch" if impl == "torch" else "auto"


def convolutions(size: int, width: int, weight: Tensor, conv_impl: str) -> str:
    """Whose convolutions networks of this shape have, in words; `weight` is one of theirs."""
    if not weight.is_cuda:
        return "PyTorch's convolutions"
    if conv_impl == "torch":
        return "cuDNN's convolutions"
    if not conv4x4_runs(weight.dtype, weight.device):
        return "cuDNN's convolutions (fastgan's are for 16 bits on sm_90)"
    base, doublings = split_size(size)
    inner = [*channels(size, width), 3]
    faults = [
        unfit(inner[i + 1], inner[i], base << i, base << i)  # of the small map, which is first
        for i in range(doublings)
    ]
    fit = faults.count("")
    if fit == doublings:
        return "fastgan's convolutions"
    why = next(fault for fault in faults if fault)
    return f"fastgan's convolutions in {fit} of {doublings} layers, cuDNN's elsewhere: {why}"


class FirstBlock(nn.Module):
    """Latents [B, cin] to maps [B, cout, base, base]: transposed convolution, batch norm, ReLU.

    The transposed convolution of a single pixel is a matrix product, and is computed as one.
    """

    def __init__(self, cin: int, cout: int, base: int, impl: str) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(cin, cout, base, 1, 0, bias=False)
        self.norm = BatchNormAct2d(cout, act="relu", impl=impl)

    def forward(self, latents: Tensor) -> Tensor:
        weight = self.conv.weight.permute(0, 2, 3, 1)  # the order of channels-last memory
        y = latents @ weight.flatten(1)
        return self.norm(y.view(-1, *weight.shape[1:]).permute(0, 3, 1, 2))


class UpBlock(nn.Module):
    """Transposed convolution that doubles the map, batch norm, ReLU."""

    def __init__(self, cin: int, cout: int, impl: str, conv_impl: str) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(cin, cout, 4, 2, 1, bias=False)
        self.norm = BatchNormAct2d(cout, act="relu", impl=impl)
        self.conv_impl = conv_impl

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(conv_transpose4x4(x, self.conv.weight, impl=self.conv_impl))


class DownBlock(nn.Module):
    """Convolution that halves the map, batch norm with `groups` of statistics, LeakyReLU."""

    def __init__(self, cin: int, cout: int, impl: str, conv_impl: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 4, 2, 1, bias=False)
        self.norm = BatchNormAct2d(cout, act="leaky_relu", negative_slope=LEAKY_SLOPE, impl=impl)
        self.conv_impl = conv_impl

    def forward(self, x: Tensor, groups: int) -> Tensor:
        return self.norm(conv4x4(x, self.conv.weight, impl=self.conv_impl), groups)


class Generator(nn.Module):
    """Latents [B, latent] to images [B, 3, size, size] in `pixel_range` (tanh for [-1, 1], sigmoid
    for [0, 1]). `impl` is `bn_act`'s, `conv_impl` that of `conv4x4` ("torch" beside "torch", else
    "auto"); `latent_dist` is what its latents are to be drawn from.
    """

    arch = "dcgan"

    def __init__(
        self,
        size: int = 64,
        latent: int = 100,
        width: int = 64,
        pixel_range: PixelRange = (-1.0, 1.0),
        impl: str = "auto",
        conv_impl: str | None = None,
        latent_dist: LatentDist = "normal",
    ) -> None:
        super().__init__()
        base, _ = split_size(size)
        inner = channels(size, width)
        conv_impl = conv_impl or convolutions_beside(impl)
        self.size, self.latent, self.width = size, latent, width
        self.pixel_range, self.latent_dist = pixel_range, latent_dist
        self.conv_impl = conv_impl
        self.blocks = nn.ModuleList([FirstBlock(latent, inner[0], base, impl)])
        for cin, cout in zip(inner, inner[1:], strict=False):
            self.blocks.append(UpBlock(cin, cout, impl, conv_impl))
        self.last = nn.ConvTranspose2d(inner[-1], 3, 4, 2, 1, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        x = latents
        for block in self.blocks:
            x = block(x)
        x = conv_transpose4x4(x, self.last.weight, impl=self.conv_impl)
        return torch.tanh(x) if self.pixel_range[0] < 0 else torch.sigmoid(x)


class Discriminator(nn.Module):
    """Images [B, 3, size, size] to logits [B]; `groups` parts of the batch have batch-norm
    statistics of their own. `impl` is `bn_act`'s, `conv_impl` as in `Generator`.
    """

    arch = "dcgan"

    def __init__(
        self,
        size: int = 64,
        width: int = 64,
        impl: str = "auto",
        conv_impl: str | None = None,
    ) -> None:
        super().__init__()
        base, _ = split_size(size)
        inner = channels(size, width)[::-1]
        conv_impl = conv_impl or convolutions_beside(impl)
        self.size, self.width, self.conv_impl = size, width, conv_impl
        self.first = nn.Conv2d(3, inner[0], 4, 2, 1, bias=False)
        self.blocks = nn.ModuleList(
            DownBlock(cin, cout, impl, conv_impl)
            for cin, cout in zip(inner, inner[1:], strict=False)
        )
        self.last = nn.Conv2d(inner[-1], 1, base, 1, 0, bias=False)

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        weight = self.first.weight
        x = conv4x4(images, weight, negative_slope=LEAKY_SLOPE, impl=self.conv_impl)
        for block in self.blocks:
            x = block(x, groups)
        # the last convolution takes all of the map: a dot product, in the order of channels-last
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.last.weight))
        return F.linear(x, weight).flatten()


@torch.no_grad()
def paper_init(network: nn.Module, generator: torch.Generator) -> None:
    """The paper's initialisation: convolutions N(0, 0.02), batch-norm weights N(1, 0.02), biases
    0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.normal_(0.0, 0.02, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, BatchNormAct2d):
            module.weight.normal_(1.0, 0.02, generator=generator)
            module.bias.zero_()
