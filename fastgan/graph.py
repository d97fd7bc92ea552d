"""A whole step as one CUDA graph: its hundred launches cost the host one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .data.feed import Batch
from .errors import RunError, first_line, is_out_of_memory

# Whether a graph has to be told what it draws from; later versions see it in the capture.
REGISTERS = torch.__version__ < "2.14"
WARM_UP = 3  # steps: code is compiled, cuDNN's algorithms are searched, libraries get their memory


@contextmanager
def undone(state: Sequence[Tensor], random: torch.Generator) -> Iterator[None]:
    """What the block does to `state` and draws from `random` is put back when it ends."""
    before, position = [t.clone() for t in state], random.get_state()
    yield
    with torch.no_grad():
        for t, was in zip(state, before, strict=True):
            t.copy_(was)
    random.set_state(position)


def warm_up(
    advance: Callable[[Batch], Any],
    batch: Batch,
    state: Sequence[Tensor],
    random: torch.Generator,
) -> None:
    """Run `advance` on `batch` a few times and put everything back: it trains nothing.

    Args:
        state: every tensor that `advance` changes and a later call reads.
        random: what it draws from.
    """
    with undone(state, random):
        for _ in range(WARM_UP):
            advance(batch)


class Graphed:
    """`advance` captured as a CUDA graph, which each call replays on the batch that it is given.

    What the graph changes, reads and draws is what a plain call would: tensors of `state` in place,
    the resident images by the batch's index, random numbers from `random`, which goes on from
    wherever it is set to.

    Args:
        advance: on a batch, operations on the device of fixed shapes alone, and no reading back.
        batch: any batch of the set; its images are those of every later one.
        state, random: `warm_up`'s.
        beside: another graph, whose memory it shares (and whose stream, by which PyTorch keeps
            memory): the two are never replayed at once, and neither leaves anything there for the
            other.

    Raises:
        RunError: it could not be captured.
    """

    def __init__(
        self,
        advance: Callable[[Batch], Any],
        batch: Batch,
        state: Sequence[Tensor],
        random: torch.Generator,
        beside: Graphed | None = None,
    ) -> None:
        self._batch = Batch(batch.images, batch.index.clone())
        self._advance = advance  # whose tensors the graph reads and writes: they live as long
        current = torch.cuda.current_stream()
        side = beside._stream if beside else torch.cuda.Stream(batch.index.device)
        pool = beside._graph.pool() if beside else None
        self._stream: torch.cuda.Stream = side
        side.wait_stream(current)
        with torch.cuda.stream(side):
            warm_up(advance, self._batch, state, random)
        current.wait_stream(side)
        self._graph: torch.cuda.CUDAGraph = torch.cuda.CUDAGraph()
        if REGISTERS:
            self._graph.register_generator_state(random)
        gc.collect()  # nothing is freed in the middle, and what the warm-up left makes room
        failed: list[BaseException] = []
        try:
            # other threads may go on asking the GPU things meanwhile, as NCCL's does
            with torch.cuda.graph(
                self._graph, pool=pool, stream=side, capture_error_mode="thread_local"
            ):
                # an error here makes the end of the capture fail, too, which would hide it
                self._result = _noting(failed, advance, self._batch)
        except Exception as error:
            torch.cuda.set_stream(current)  # a capture that cannot be ended leaves its own
            cause = failed[0] if failed else error
            if is_out_of_memory(cause) or not isinstance(cause, Exception):
                raise cause from None
            raise RunError(
                f"the step could not be captured as a CUDA graph ({first_line(cause)}); --no-graph "
                "trains without one"
            ) from cause

    def __call__(self, batch: Batch) -> Any:
        """What `advance` returned, in tensors that the next call writes anew."""
        self._batch.index.copy_(batch.index)
        self._graph.replay()
        return self._result


def _noting(failed: list[BaseException], advance: Callable[[Batch], Any], batch: Batch) -> Any:
    try:
        return advance(batch)
    except BaseException as error:
        failed.append(error)
        raise
