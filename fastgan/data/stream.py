"""Batches that are made ahead by a thread and sent through double buffers: for sets that are not on
the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from .feed import Batch, Feed, Sampler, as_tensor

SLOTS = 2  # one is read by the step while the other is filled

# From endless batches of numbers (int64 [B]) to their pixels (uint8 [B, H, W, 3]), in order.
Fetch = Callable[[Iterator[np.ndarray]], Iterator[np.ndarray | torch.Tensor]]


class StreamFeed(Feed):
    """Batches whose pixels `fetch` gives, a few ahead of the step.

    On a GPU they pass through pinned memory and a stream of their own, so that neither the host nor
    the step waits for the copy. `images` holds the two buffers, batches refer to one in turn.

    Args:
        size: edge of the images in pixels.
        interrupt: called from another thread to end what `fetch` waits for.
    """

    def __init__(
        self,
        fetch: Fetch,
        size: int,
        sampler: Sampler,
        device: torch.device,
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(sampler)
        self._fetch, self._share, self._interrupt = fetch, sampler.share, interrupt
        shape = (SLOTS * self._share, size, size, 3)
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._index = torch.arange(SLOTS * self._share, device=device).split(self._share)
        self._buffers = self.images.split(self._share)
        self._upload = _Upload(self._buffers) if device.type == "cuda" else None
        self._thread: threading.Thread | None = None
        self._taken: int | None = None  # the slot that the step reads

    def next(self) -> Batch:
        if self._thread is None:
            self._start()
        self._give_back()
        slot = self._ready.get()
        if isinstance(slot, BaseException):
            self.close()
            raise slot
        if self._upload is not None:
            self._upload.wait(slot)
        self._sampler.pieces()
        self._taken = slot
        return Batch(self.images, self._index[slot])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        super().load_state_dict(state)

    def close(self) -> None:
        self._give_back()
        if self._thread is not None:
            self._free.put(None)
            self._interrupt()
            self._thread.join()
            self._thread = None
        if self._upload is not None:
            self._upload.finish()

    def _give_back(self) -> None:
        """What was queued until here is all that reads the slot last taken."""
        if self._taken is not None:
            if self._upload is not None:
                self._upload.read(self._taken)
            self._free.put(self._taken)
            self._taken = None

    def _start(self) -> None:
        # Not before the first batch is asked for: while another thread captures the step as a CUDA
        # graph, nothing here may allocate memory on the GPU.
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._ready: SimpleQueue[int | BaseException] = SimpleQueue()
        for slot in range(SLOTS):
            self._free.put(slot)
        batches = self._fetch(_walk(deepcopy(self._sampler)))  # here: `interrupt` may come at once
        self._thread = threading.Thread(
            target=self._fill, args=(batches,), name="fastgan feed", daemon=True
        )
        self._thread.start()

    def _fill(self, batches: Iterator[np.ndarray | torch.Tensor]) -> None:
        try:
            if self._upload is not None:
                self._upload.enter()
            for pixels in batches:
                slot = self._free.get()
                if slot is None:
                    return
                pixels = torch.as_tensor(pixels)
                if self._upload is None:
                    self._buffers[slot].copy_(pixels)
                else:
                    self._upload.send(slot, pixels)
                self._ready.put(slot)
        except BaseException as error:
            self._ready.put(error)


class _Upload:
    """Copies into the buffers on the GPU, each when the step has read what was there before."""

    def __init__(self, buffers: tuple[torch.Tensor, ...]) -> None:
        self._buffers = buffers
        self._pinned = [torch.empty(b.shape, dtype=b.dtype, pin_memory=True) for b in buffers]
        self._device = buffers[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # it zeroes the buffers
        self._sent = [torch.cuda.Event() for _ in buffers]
        self._read = [torch.cuda.Event() for _ in buffers]

    def enter(self) -> None:
        """In the thread that sends: else it would go back to the first GPU after each batch, and
        take half a gigabyte there in every process.
        """
        torch.cuda.set_device(self._device)

    def send(self, slot: int, pixels: torch.Tensor) -> None:
        self._sent[slot].synchronize()  # the copy before may still read the pinned memory
        self._pinned[slot].copy_(pixels)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._read[slot])
            self._buffers[slot].copy_(self._pinned[slot], non_blocking=True)
            self._sent[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """What is queued from here on sees the slot's new pixels."""
        torch.cuda.current_stream(self._device).wait_event(self._sent[slot])

    def read(self, slot: int) -> None:
        """What was queued until here is all that reads the slot's pixels."""
        self._read[slot].record(torch.cuda.current_stream(self._device))

    def finish(self) -> None:
        """Wait for the copies under way: the buffers may be freed next."""
        self._stream.synchronize()


def from_map(images: np.ndarray) -> Fetch:
    """Rows of a memory map; they are read by torch, which lets other threads run meanwhile."""
    host = as_tensor(images)

    def fetch(numbers: Iterator[np.ndarray]) -> Iterator[torch.Tensor]:
        for rows in numbers:
            yield host.index_select(0, torch.from_numpy(rows))

    return fetch


def _walk(sampler: Sampler) -> Iterator[np.ndarray]:
    while True:
        yield sampler.next()
