"""The networks of the recipes two-rate64 and two-rate64-autoencoder, at 64 px and pixels from 0 to
1: a small discriminator, which pools on averages, and two generators that end in a ReLU, so that a
pixel may pass 1, and is white then. Every layer has a bias.

    discriminator   Conv 7x7 (3, 32), AvgPool 2, LeakyReLU; Conv 5x5 (32, 64), AvgPool 2, LeakyReLU;
                    Conv 3x3 stride 2 (64, 128), ReLU; Conv 3x3 stride 2 (128, 256), ReLU;
                    Linear (4096, 1)                                             429,121 parameters
    generator       5 maps of 5x5 numbers to 4, 8, 16, 32, 64 pixels by transposed convolutions,
                    ReLU, and batch norm behind the first three                  125,811
    autoencoder     an image of noise to an image, all of its layers at 64x64    1,961,859; 8.03
                    billion multiply-adds an image, 77 times the DCGAN generator's

A vector of latents is those maps in the order of PyTorch's [C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan_kernels import BatchNormAct2d

from ..config import FIXED, LatentDist, PixelRange

LEAKY_SLOPE = 0.01
SIZE, WIDTH = 64, 64  # the width is none of theirs: the option's default
PIXEL_RANGE: PixelRange = (0.0, 1.0)


class TwoRateGenerator(nn.Module):
    """Latents [B, 125] to images [B, 3, 64, 64] of 0 or more; `impl` is `bn_act`'s."""

    arch = "two-rate"

    def __init__(self, impl: str = "auto", *, latent_dist: LatentDist = "normal") -> None:
        super().__init__()
        self.size, self.latent = FIXED[self.arch]
        self.width, self.pixel_range, self.latent_dist = WIDTH, PIXEL_RANGE, latent_dist
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(5, 128, 4, 1, 2),  # to 4 px
            nn.ReLU(),
            BatchNormAct2d(128, act="none", impl=impl),
            nn.ConvTranspose2d(128, 64, 3, 3, 2),
            nn.ReLU(),
            BatchNormAct2d(64, act="none", impl=impl),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.ReLU(),
            BatchNormAct2d(32, act="none", impl=impl),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 2, 2),
            nn.ReLU(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(_maps(latents, 5, 5))


class AutoencoderGenerator(nn.Module):
    """Latents [B, 12288], an image of noise [3, 64, 64] each, to images [B, 3, 64, 64] of 0 or
    more.
    """

    arch = "two-rate-autoencoder"

    def __init__(self, *, latent_dist: LatentDist = "normal") -> None:
        super().__init__()
        self.size, self.latent = FIXED[self.arch]
        self.width, self.pixel_range, self.latent_dist = WIDTH, PIXEL_RANGE, latent_dist
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(64, 128, 5, 1, 2),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(128, 256, 7, 1, 3),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(256, 64, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(64, 3, 3, 1, 1),
            nn.ReLU(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(_maps(latents, 3, self.size))


class TwoRateDiscriminator(nn.Module):
    """Images [B, 3, 64, 64] to logits [B], for both generators. Nothing is normalised, and `groups`
    changes nothing.
    """

    arch = "two-rate"

    def __init__(self) -> None:
        super().__init__()
        self.size, self.width = SIZE, WIDTH
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 7, 1, 3),
            nn.AvgPool2d(2),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(32, 64, 5, 1, 2),
            nn.AvgPool2d(2),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(64, 128, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),  # by [C, H, W], whatever memory the maps are in
            nn.Linear(256 * 4 * 4, 1),
        )

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        return self.layers(images).flatten()


def _maps(latents: Tensor, channels: int, side: int) -> Tensor:
    """[B, channels * side * side] as maps in channels-last memory."""
    maps = latents.unflatten(1, (channels, side, side))
    return maps.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def default_init(network: nn.Module, random: torch.Generator) -> None:
    """PyTorch's own initialisation, drawn from `random`: weights and biases of a layer uniform up
    to 1 / sqrt(fan-in), where a transposed convolution's fan-in is PyTorch's count, of its output
    channels; batch norms 1 and 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            bound = module.weight.shape[1:].numel() ** -0.5
            module.weight.uniform_(-bound, bound, generator=random)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=random)
        elif isinstance(module, BatchNormAct2d):
            module.weight.fill_(1.0)
            module.bias.zero_()
