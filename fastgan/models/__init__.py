"""The architectures."""

from .dcgan import Discriminator, Generator, init_weights

__all__ = ["Discriminator", "Generator", "init_weights"]
