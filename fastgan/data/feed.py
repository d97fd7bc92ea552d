"""Batches, drawn from shuffled epochs by index, and the set that is resident on the device.

Batches have one size and run across the ends of epochs: the walk goes over concatenated
permutations, so that the step's shapes never change and every image comes exactly once an epoch.
The position is two integers, and the order the same for every feed and any number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import RunError

UPLOAD_BYTES = 256 << 20  # copied to the GPU at a time


class Batch(NamedTuple):
    """A batch by reference: the step gathers images[index] itself."""

    images: torch.Tensor  # uint8 [N, H, W, 3] on the device, the same tensor in every batch
    # it hides tuple.index, which nobody needs here
    index: torch.Tensor  # type: ignore[assignment]  # int64 [B], on the device


class Sampler:
    """An endless walk over 0 to count - 1, `batch` numbers at a time, in a new order each epoch.

    The order of epoch e is np.random.default_rng([seed, e]).permutation(count): any position can be
    taken up again without the ones before. Of `world` ranks each is given its share of every batch,
    the position is that of all.
    """

    def __init__(self, count: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        least = {"count": (count, 1), "batch": (batch, 1), "seed": (seed, 0), "world": (world, 1)}
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"Sampler: {name} must be {low} or more, got {value}")
        if batch % world or not 0 <= rank < world:
            raise ValueError(
                f"Sampler: batch must be a multiple of world and rank below it, got batch {batch}, "
                f"rank {rank}, world {world}"
            )
        self.count, self.batch, self.seed = count, batch, seed
        self.share = batch // world  # of each batch, this rank's
        self._before = rank * self.share  # of each batch, earlier ranks'
        self.epoch = 0  # epochs completed
        self.offset = 0  # images of this epoch already taken, 0 to count - 1
        self._order = (-1, np.empty(0, np.int64))  # the epoch that was drawn last

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 [count], the order of one epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def pieces(self) -> list[tuple[int, int, int]]:
        """This rank's share of the next batch as (epoch, start, stop) in the epochs' orders; moves
        the position on.
        """
        pieces = []
        epoch, start = self._after(self._before)
        left = self.share
        while left:
            stop = min(start + left, self.count)
            pieces.append((epoch, start, stop))
            left -= stop - start
            epoch, start = (epoch, stop) if stop < self.count else (epoch + 1, 0)
        self.epoch, self.offset = self._after(self.batch)
        return pieces

    def _after(self, images: int) -> tuple[int, int]:
        """The position so many images on."""
        epochs, offset = divmod(self.offset + images, self.count)
        return self.epoch + epochs, offset

    def next(self) -> np.ndarray:
        """int64 [share], the numbers of this rank's share of the next batch."""
        parts = []
        for epoch, start, stop in self.pieces():
            if self._order[0] != epoch:
                self._order = (epoch, self.permutation(epoch))
            parts.append(self._order[1][start:stop])
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, int]:
        """The position: all that has to be kept to go on from here."""
        return {"epoch": self.epoch, "offset": self.offset}

    def state_before(self, batches: int) -> dict[str, int]:
        """The position so many batches ago."""
        epoch, offset = self._after(-batches * self.batch)
        return {"epoch": epoch, "offset": offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; raises `ValueError` for one that this walk cannot be at."""
        if state.keys() != {"epoch", "offset"}:
            raise ValueError(f"Sampler: state must hold epoch and offset, got {sorted(state)}")
        for name, below in (("epoch", None), ("offset", self.count)):
            value = state[name]
            fits = isinstance(value, int) and value >= 0 and (below is None or value < below)
            if not fits or isinstance(value, bool):
                rule = "0 or more" if below is None else f"0 to {below - 1:,}"
                raise ValueError(f"Sampler: {name} must be a whole number, {rule}; got {value!r}")
        self.epoch, self.offset = state["epoch"], state["offset"]


class Feed:
    """Where the step's batches come from.

    Attributes:
        images: uint8 [N, H, W, 3] on the device, what the batches index.
    """

    images: torch.Tensor

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._sampler.epoch

    def next(self) -> Batch:
        """The next batch. Its index is not to be written to, its images are good until the next."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """The position: all that has to be kept to go on from here."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; `ValueError` for one that cannot be."""
        self._sampler.load_state_dict(state)

    def rewind(self, batches: int) -> None:
        """Go back by so many batches."""
        self.load_state_dict(self._sampler.state_before(batches))

    def close(self) -> None:
        """End what works ahead."""


class ResidentFeed(Feed):
    """Batches from a set that lies on the device as a whole.

    On a CPU the memory map itself is used, so that nothing is read before it is needed and nothing
    twice. On a GPU the set is uploaded once, and each epoch's order once: a batch is then a slice
    of it, and no step waits for the host.
    """

    def __init__(self, images: np.ndarray, sampler: Sampler, device: torch.device) -> None:
        super().__init__(sampler)
        self.device = device
        self._orders: dict[int, torch.Tensor] = {}  # by epoch, those of the last batch
        self.images = _resident(images, device)

    def next(self) -> Batch:
        pieces = self._sampler.pieces()
        epochs = {epoch for epoch, _, _ in pieces}
        self._orders = {epoch: self._order(epoch) for epoch in epochs}
        parts = [self._orders[epoch][start:stop] for epoch, start, stop in pieces]
        return Batch(self.images, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch in self._orders:
            return self._orders[epoch]
        order = torch.from_numpy(self._sampler.permutation(epoch))
        if self.device.type == "cuda":
            # pinned, so that the copy neither waits for the stream nor makes the host wait
            return order.pin_memory().to(self.device, non_blocking=True)
        return order.to(self.device)


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """A read-only array, such as a map, as a tensor of the same memory."""
    with warnings.catch_warnings():
        # "not writable": nothing here writes to the images, and the map is read-only on purpose
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(images)


def _resident(images: np.ndarray, device: torch.device) -> torch.Tensor:
    host = as_tensor(images)
    if device.type == "cpu":
        return host
    try:
        resident = torch.empty(host.shape, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise RunError(_no_room(host, device)) from error
    rows = max(1, UPLOAD_BYTES // max(1, host[0].numel()))
    for start in range(0, len(host), rows):
        resident[start : start + rows].copy_(host[start : start + rows])
    return resident


def _no_room(host: torch.Tensor, device: torch.device) -> str:
    count, height, width, channels = host.shape
    free, total = torch.cuda.mem_get_info(device)
    return (
        "the set does not fit on the GPU: "
        f"{count:,} images x {height} x {width} x {channels} bytes "
        f"= {host.numel() / 1e9:,.1f} GB, and {free / 1e9:,.1f} of {total / 1e9:,.1f} GB are free; "
        "--loader stream sends them batch by batch"
    )
