"""The architectures."""

from .dcgan import Discriminator, Generator, convolutions, init_weights

__all__ = ["Discriminator", "Generator", "convolutions", "init_weights"]
