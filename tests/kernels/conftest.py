"""Where the kernels run, and memory that shows what they did not write."""

import contextlib
import sys

import pytest
import torch

from fastgan_kernels import _launch

MODULES = (
    "bn_act_kernels",
    "conv4x4",
    "conv4x4_kernels",
    "gather_u8",
)  # those that allocate through _launch


@pytest.fixture
def device():
    """The GPU, or the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def pinned_algorithms(monkeypatch):
    """cuDNN's choices the same every time, and in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """A kernel that leaves one element of its output unwritten yields NaN, not luck."""

    def nan(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty, empty_like = _launch.empty, _launch.empty_like
    for name in MODULES:
        module = sys.modules[f"fastgan_kernels.{name}"]
        for function in {"empty", "empty_like"} & vars(module).keys():
            real = {"empty": empty, "empty_like": empty_like}[function]
            monkeypatch.setattr(module, function, lambda *a, real=real, **k: nan(real(*a, **k)))


@pytest.fixture
def backwards(monkeypatch):
    """A context in which the interpreter runs each grid's programs from the last to the first; it
    gives the list of those that ran.
    """
    if not _launch.INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    from triton.runtime.interpreter import interpreter_builder as builder

    @contextlib.contextmanager
    def reversed_grids():
        ran, forwards = [], builder.set_grid_idx

        def set_grid_idx(*place):
            ran.append(place)
            sizes = builder.grid_dim
            forwards(*(size - 1 - i for size, i in zip(sizes, place, strict=True)))

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", set_grid_idx)
            yield ran

    return reversed_grids
