"""Classifier two-sample test: how often a new network tells held-out generated images from real
ones (Lopez-Paz and Oquab 2017, arXiv:1610.06545).

Half of each set trains a small convolutional network, for a fixed number of steps or until it makes
no mistakes (of noise, a seventh of them); its accuracy on the other half is the score. 0.5: it sees
no difference, which is no proof that there is none; 1: it is never wrong. The interval is that of
the held-out images alone: another seed is another network and another split.

So that the test is of pictures and not of how they came to be bytes, both sets are seen through
noise of some grey levels, which hides how values were rounded and which levels occur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .images import checked_pair

FEWEST = 64  # images of each set: 32 to train on
SMALLEST = 16  # pixels a side
BATCH, STEPS = 128, 400  # 10 passes over 2 x 5,000 images, of which it trains on half
RATE = 2e-3  # at first, and linearly to 0
LEARNT, IN_A_ROW = 3e-3, 32  # the loss that leaves nothing to learn, and of how many steps
WIDTH, WIDEST = 16, 128  # channels of the first layer, and at most
LAST = 7  # pixels a side after the last layer at most
NOISE = 2 / 127.5  # of standard deviation: 2 grey levels
Z95 = 1.959964  # standard deviations of 95%


@dataclass(frozen=True)
class TwoSample:
    """The outcome of the test.

    Attributes:
        accuracy: the share of held-out images told rightly, half of which are real.
        low, high: its 95% confidence interval.
        count: of held-out images.
    """

    accuracy: float
    low: float
    high: float
    count: int


def c2st(
    real: ArrayLike,
    fake: ArrayLike,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> TwoSample:
    """Train a classifier and test it. Of the larger set as many images are drawn as the other has.

    Args:
        real, fake: uint8 [N, H, W, 3] and [M, H, W, 3], 64 or more each, H and W 16 or more, of no
            image in both. Memory maps are read a batch at a time.
        seed: of the split, the network, the order and the noise. On a CPU the same seed and number
            of threads give the same bits.
        device: to train on.
        progress: is told, at each step, of how many of the smaller set's images that is the share.

    Raises:
        ValueError: of another type or shape.
    """
    sets = checked_pair(real, fake, "c2st", FEWEST, SMALLEST)
    splits, order, weights, noise = np.random.SeedSequence(seed).generate_state(4).tolist()
    each = min(map(len, sets))
    random = np.random.default_rng(splits)
    rows = np.stack([random.permutation(len(images))[:each] for images in sets])
    trained, held_out = rows[:, : each // 2], rows[:, each // 2 :]
    network = _network(sets[0].shape[1:3], weights).to(device)
    view = _View(sets, noise, torch.device(device))

    def tell(step: int) -> None:
        if progress is not None:
            progress(each * step // STEPS)

    _train(network, view, trained, np.random.default_rng(order), tell)
    right = _right(network, view, held_out)
    low, high = wilson(right, held_out.size)
    return TwoSample(right / held_out.size, low, high, held_out.size)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a share, `right` of `count` (Wilson 1927)."""
    share, weight = right / count, Z95**2 / count
    middle = share + weight / 2
    half = Z95 * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


class _View:
    """Batches of both sets as the network sees them."""

    def __init__(self, sets: tuple[np.ndarray, np.ndarray], seed: int, device: torch.device):
        self._sets = sets
        self._device = device
        self._random = torch.Generator(device).manual_seed(seed)

    def batch(self, labels: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, H, W] in [-1, 1] and noise, channels-last whatever layout the sets have;
        and float32 [B] of 0 and 1.
        """
        pixels = np.empty((len(rows), *self._sets[0].shape[1:]), np.uint8)
        for label, images in enumerate(self._sets):
            pixels[labels == label] = images[rows[labels == label]]
        seen = torch.from_numpy(pixels).to(self._device).float() / 127.5 - 1
        # contiguous: in another layout the draw takes five times as long
        seen += torch.empty_like(seen).normal_(0, NOISE, generator=self._random)
        wanted = torch.from_numpy(labels).to(self._device, torch.float32)
        return seen.permute(0, 3, 1, 2), wanted


def _network(size: tuple[int, ...], seed: int) -> nn.Module:
    """Strided convolutions down to LAST px a side, then one number: above 0 is generated."""
    (height, width), channels = size, 3
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, of whatever device
        torch.manual_seed(seed)
        while min(height, width) > LAST:
            wide = min(WIDTH << len(layers) // 3, WIDEST)
            convolution = nn.Conv2d(channels, wide, 4, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wide), nn.LeakyReLU(0.2)]
            height, width, channels = height // 2, width // 2, wide
        layers += [nn.Flatten(), nn.Linear(channels * height * width, 1)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _train(
    network: nn.Module,
    view: _View,
    rows: np.ndarray,
    random: np.random.Generator,
    tell: Callable[[int], object],
) -> None:
    """rows: [2, n], of real and generated images; `tell` is told of each step."""
    labels, flat = np.repeat([0, 1], rows.shape[1]), rows.reshape(-1)
    batch = min(BATCH, len(flat))
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    order = np.zeros(0, np.int64)
    network.train()
    learnt = 0
    for step in range(STEPS):
        tell(step)
        if len(order) < batch:
            order = random.permutation(len(flat))
        now, order = order[:batch], order[batch:]
        seen, wanted = view.batch(labels[now], flat[now])
        loss = binary_cross_entropy_with_logits(network(seen).squeeze(1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
        learnt = learnt + 1 if loss.item() < LEARNT else 0
        if learnt == IN_A_ROW:  # the running statistics are those of about these weights by then
            break


@torch.no_grad()
def _right(network: nn.Module, view: _View, rows: np.ndarray) -> int:
    """How many of [2, n] images the network tells rightly."""
    labels, flat = np.repeat([0, 1], rows.shape[1]), rows.reshape(-1)
    network.eval()
    right = 0
    for start in range(0, len(flat), BATCH):
        part = slice(start, start + BATCH)
        seen, wanted = view.batch(labels[part], flat[part])
        right += int(((network(seen).squeeze(1) > 0) == (wanted > 0.5)).sum())
    return right
