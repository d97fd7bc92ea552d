"""Where the kernels run, and memory that shows what they did not write."""

import pytest
import torch

from fastgan_kernels import _launch

MODULES = ("bn_act_kernels", "gather_u8")  # those that allocate through _launch


@pytest.fixture
def device():
    """The GPU, or the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """A kernel that leaves one element of its output unwritten yields NaN, not luck."""
    import sys

    def nan(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty, empty_like = _launch.empty, _launch.empty_like
    for name in MODULES:
        module = sys.modules[f"fastgan_kernels.{name}"]
        for function in {"empty", "empty_like"} & vars(module).keys():
            real = {"empty": empty, "empty_like": empty_like}[function]
            monkeypatch.setattr(module, function, lambda *a, real=real, **k: nan(real(*a, **k)))
