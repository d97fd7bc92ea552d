"""The yardstick: the DCGAN of the PyTorch tutorial, plain and eager, sharing no code with the fast
path.

Network, initialisation, loss and order of operations are those of "DCGAN Tutorial"
(docs.pytorch.org) and of pytorch/examples `dcgan/main.py`: NCHW, float32, nn.BatchNorm2d, a
sigmoid and nn.BCELoss, D on real and on fake in two passes, Adam(2e-4, betas 0.5 / 0.999), five
`.item()` a step. Beyond the tutorial it takes any size that halves to 4, 5, 6 or 7, a dtype and a
device, and latents from a generator of its own, so that tests can hand both paths the same
numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


def weights_init(m: nn.Module) -> None:
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.02)  # type: ignore[arg-type]
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight.data, 1.0, 0.02)  # type: ignore[arg-type]
        nn.init.constant_(m.bias.data, 0)  # type: ignore[arg-type]


def _multiples(size: int) -> tuple[int, list[int]]:
    """The smallest map's edge, and channel multiples from the image inwards: 64 gives 4, [1, 2, 4,
    8].
    """
    multiples: list[int] = []
    while size > 7:
        multiples.append(min(2 ** len(multiples), 16))
        size //= 2
    return size, multiples


def make_generator(size: int = 64, nz: int = 100, ngf: int = 64) -> nn.Sequential:
    """Latents [B, nz, 1, 1] to images [B, 3, size, size] in [-1, 1]."""
    base, multiples = _multiples(size)
    widths = [ngf * m for m in reversed(multiples)]
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(nz, widths[0], base, 1, 0, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(True),
    ]
    for i in range(1, len(widths)):
        layers += [
            nn.ConvTranspose2d(widths[i - 1], widths[i], 4, 2, 1, bias=False),
            nn.BatchNorm2d(widths[i]),
            nn.ReLU(True),
        ]
    layers += [nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def make_discriminator(size: int = 64, ndf: int = 64) -> nn.Sequential:
    """Images [B, 3, size, size] to probabilities [B, 1, 1, 1]."""
    base, multiples = _multiples(size)
    widths = [ndf * m for m in multiples]
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for i in range(1, len(widths)):
        layers += [
            nn.Conv2d(widths[i - 1], widths[i], 4, 2, 1, bias=False),
            nn.BatchNorm2d(widths[i]),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    layers += [nn.Conv2d(widths[-1], 1, base, 1, 0, bias=False), nn.Sigmoid()]
    return nn.Sequential(*layers)


class ReferenceStats(NamedTuple):
    """The five numbers that the tutorial reads back every iteration."""

    d_loss: float
    g_loss: float
    d_x: float
    d_g_z1: float
    d_g_z2: float


class Reference:
    """Both networks, both optimizers, and the tutorial's loop body as `step`."""

    def __init__(
        self,
        size: int = 64,
        nz: int = 100,
        width: int = 64,
        *,
        lr: float = 2e-4,
        beta1: float = 0.5,
        seed: int = 999,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.nz, self.dtype, self.device = nz, dtype, torch.device(device)
        self.netG = make_generator(size, nz, width).to(self.device, dtype)
        self.netG.apply(weights_init)
        self.netD = make_discriminator(size, width).to(self.device, dtype)
        self.netD.apply(weights_init)
        self.criterion = nn.BCELoss()
        self.optimizerD = torch.optim.Adam(self.netD.parameters(), lr=lr, betas=(beta1, 0.999))
        self.optimizerG = torch.optim.Adam(self.netG.parameters(), lr=lr, betas=(beta1, 0.999))
        self.noise = torch.Generator(self.device).manual_seed(seed)

    def draw(self, count: int) -> torch.Tensor:
        """Latents [count, nz, 1, 1] from N(0, 1)."""
        return torch.randn(
            count, self.nz, 1, 1, generator=self.noise, dtype=self.dtype, device=self.device
        )

    def step(self, real: torch.Tensor) -> ReferenceStats:
        """One iteration on real images [B, 3, size, size] in [-1, 1]."""
        b_size = real.size(0)
        # (1) Update D: maximise log(D(x)) + log(1 - D(G(z)))
        self.netD.zero_grad()
        label = torch.full((b_size,), 1.0, dtype=self.dtype, device=self.device)
        output = self.netD(real).view(-1)
        errD_real = self.criterion(output, label)
        errD_real.backward()
        D_x = output.mean().item()

        noise = self.draw(b_size)
        fake = self.netG(noise)
        label.fill_(0.0)
        output = self.netD(fake.detach()).view(-1)
        errD_fake = self.criterion(output, label)
        errD_fake.backward()
        D_G_z1 = output.mean().item()
        errD = errD_real + errD_fake
        self.optimizerD.step()

        # (2) Update G: maximise log(D(G(z)))
        self.netG.zero_grad()
        label.fill_(1.0)
        output = self.netD(fake).view(-1)
        errG = self.criterion(output, label)
        errG.backward()
        D_G_z2 = output.mean().item()
        self.optimizerG.step()
        return ReferenceStats(errD.item(), errG.item(), D_x, D_G_z1, D_G_z2)
