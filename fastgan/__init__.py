"""fastgan: DCGAN-family face generators, trained at the speed of the card."""

__version__ = "0.1.0"
