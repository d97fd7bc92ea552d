"""The architectures, and the one that options name."""

from .choice import (
    AnyDiscriminator,
    AnyGenerator,
    convolutions_of,
    init_weights,
    make_discriminator,
    make_generator,
)
from .dcgan import Discriminator, Generator, convolutions
from .sn_dcgan import SpectralDiscriminator
from .spectral import SpectralNorm

__all__ = [
    "AnyDiscriminator",
    "AnyGenerator",
    "Discriminator",
    "Generator",
    "SpectralDiscriminator",
    "SpectralNorm",
    "convolutions",
    "convolutions_of",
    "init_weights",
    "make_discriminator",
    "make_generator",
]
