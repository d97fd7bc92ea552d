"""A CUDA graph without a GPU: what was captured is done again on the same tensors, without any of
the Python that stood around it. What a graph would freeze (a number read on the host, a branch, a
list that grew) freezes here too.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan import graph
from fastgan.graph import Graphed, undone


class Tape(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`. Unlike one it does what it records, which
    `in_the_place_of_cuda` puts back.
    """

    def __init__(self):
        super().__init__()
        self.done = []
        self.registered = []

    def pool(self):
        return id(self)

    def register_generator_state(self, generator):
        assert graph.REGISTERS  # it is going to be removed
        self.registered.append(generator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in kwargs.values():
            if isinstance(value, torch.Generator) and graph.REGISTERS:
                assert self._knows(value)
        result = func(*args, **kwargs)
        self.done.append((func, args, kwargs, result))
        return result

    def _knows(self, generator):
        states = [known.get_state() for known in self.registered]
        return any(torch.equal(generator.get_state(), state) for state in states)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)  # not a view, nor an argument changed in place


@contextmanager
def capturing(tape, pool, stream, capture_error_mode):
    with tape:
        yield


def in_the_place_of_cuda(monkeypatch):
    """`torch.cuda`'s graphs and streams, as far as `fastgan.graph` uses them."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Tape,
        "graph": capturing,
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda chosen: nullcontext(),
        "set_stream": lambda chosen: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    made = Graphed.__init__

    def capture(self, advance, batch, state, random, beside=None):
        with undone(state, random):
            made(self, advance, batch, state, random, beside)

    monkeypatch.setattr(Graphed, "__init__", capture)
