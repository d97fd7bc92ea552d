"""What D sees of an image: augmented (`augment.py`), and with noise (Sonderby et al. 2017,
arXiv:1610.04490, section 3.3).

A step draws its numbers anew for each of D's three looks: at real images, at G's in D's update, and
at G's again in G's update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .augment import diff_augment, numbers
from .config import Augmentation, PixelRange

REAL, FAKE, AGAIN = range(3)  # the looks


class Sight:
    """Static buffers of a step's random numbers, and what they do to images.

    Attributes:
        noise_std: 0-d, the noise's standard deviation; None where there is no noise.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        share: slice,
        policies: Sequence[Augmentation] = (),
        noise_std: float = 0.0,
        *,
        pixel_range: PixelRange = (-1.0, 1.0),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`share`: this rank's rows of the whole batch, which all ranks draw; `dtype`: that numbers
        are drawn in.
        """
        self._share, self._policies, self._range = share, tuple(policies), pixel_range
        self._uniform = self._noise = self.noise_std = None
        if policies:
            self._uniform = torch.empty(3, batch, numbers(policies), dtype=dtype, device=device)
        if noise_std:
            pixels = torch.empty(3, batch, size, size, 3, dtype=dtype, device=device)
            self._noise = pixels.permute(0, 1, 4, 2, 3)  # channels-last, as the images
            self.noise_std = torch.tensor(noise_std, dtype=dtype, device=device)

    def draw(self, random: torch.Generator) -> None:
        """Draw what a step needs."""
        if self._uniform is not None:
            self._uniform.uniform_(generator=random)
        if self._noise is not None:
            self._noise.normal_(generator=random)

    def __call__(self, images: Tensor, look: int) -> Tensor:
        """[share, 3, H, W] as D sees it at the REAL, FAKE or AGAIN look."""
        if self._uniform is not None:
            drawn = self._uniform[look, self._share]
            images = diff_augment(images, self._policies, drawn, self._range)
        if self._noise is not None:
            assert self.noise_std is not None
            noise = self._noise[look, self._share] * self.noise_std
            images = images + noise.to(images.dtype)
        return images
