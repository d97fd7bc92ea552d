"""From options to networks."""

from __future__ import annotations

from typing import TypeAlias

import torch

from ..config import NetworkOptions
from .dcgan import Discriminator, Generator, convolutions, paper_init
from .sn_dcgan import SpectralDiscriminator
from .two_rate import AutoencoderGenerator, TwoRateDiscriminator, TwoRateGenerator, default_init

AnyGenerator: TypeAlias = Generator | TwoRateGenerator | AutoencoderGenerator
AnyDiscriminator: TypeAlias = Discriminator | SpectralDiscriminator | TwoRateDiscriminator


def make_generator(options: NetworkOptions, impl: str = "auto") -> AnyGenerator:
    """The generator of these options, its weights not yet drawn; `impl`: `bn_act`'s."""
    if options.arch == "two-rate":
        return TwoRateGenerator(impl, latent_dist=options.latent_dist)
    if options.arch == "two-rate-autoencoder":
        return AutoencoderGenerator(latent_dist=options.latent_dist)
    return Generator(
        options.size,
        options.latent,
        options.width,
        options.pixel_range,
        impl,
        latent_dist=options.latent_dist,
    )


def make_discriminator(options: NetworkOptions, impl: str = "auto") -> AnyDiscriminator:
    """The discriminator of these options, its weights not yet drawn."""
    if options.arch != "dcgan":
        return TwoRateDiscriminator()
    kind = SpectralDiscriminator if options.spectral_norm else Discriminator
    return kind(options.size, options.width, impl)


def convolutions_of(network: AnyGenerator) -> str:
    """Whose convolutions it has, in words."""
    if isinstance(network, Generator):
        return convolutions(network.size, network.width, network.last.weight, network.conv_impl)
    on_gpu = next(network.parameters()).is_cuda
    return "cuDNN's convolutions" if on_gpu else "PyTorch's convolutions"


def init_weights(network: AnyGenerator | AnyDiscriminator, random: torch.Generator) -> None:
    """Draw a network's weights: as the paper does of a DCGAN, as PyTorch does of the others."""
    if network.arch == "dcgan":
        paper_init(network, random)
        if isinstance(network, SpectralDiscriminator):
            network.reset(random)
    else:
        default_init(network, random)
