"""What the host side of every kernel needs: Triton where there is one, allocations, counters, and
the one door that launches go through.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform
    triton = None
if (
    triton is None or torch.version.hip
):  # not for ROCm's Triton: kernels are defined, never launched
    triton, tl = None, SimpleNamespace(constexpr=object)

IMPLS = ("auto", "triton", "torch", "ref")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels load and store

# TRITON_INTERPRET=1 runs kernels on a CPU, program by program, in NumPy: for tests.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
# Counters that kernels leave at zero are handed out in turn; a slice comes up again after this
# many, thousands of launches later, when the kernel that had it has long ended.
COUNTERS = 1 << 18
# Tensors a launch: their pointers are kernel arguments, 4 KB of them (CUDA 12.1 takes 32), and each
# tensor is a branch of its own to compile.
MOST = 64


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, and nothing where there is no Triton.

    Integers are not specialised (on being 1, or divisible by 16): another batch size compiles
    nothing.
    """
    if triton is None:
        return kernel
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    integers = {"N", "M", "units", "chunk", "splits", "groups", "programs"}
    return triton.jit(kernel, do_not_specialize=[n for n in names if n in integers])


def choose(op: str, impl: str, x: Tensor, fault: str) -> str:
    """The implementation that `impl` means: "triton", "torch" or "ref".

    Args:
        x: what decides: on a GPU, in the interpreter, or empty.
        fault: what keeps the kernels from the arguments, or "": "auto" is then "torch".

    Raises:
        ValueError: another name, or "triton" where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        if not x.is_cuda or triton is None or not x.numel():
            return "torch"
        if fault and not torch.compiler.is_compiling():
            warnings.warn(f"{op}: PyTorch's own operator, since {fault}", stacklevel=3)
        return "torch" if fault else "triton"
    if impl == "triton":
        if triton is None:
            raise ValueError(f'{op}: impl="triton" needs the package triton, which is not here')
        if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
            raise ValueError(f'{op}: impl="triton" needs tensors on an NVIDIA GPU, got {x.device}')
        if fault:
            raise ValueError(f'{op}: for impl="triton" {fault}')
        if not x.numel():
            return "torch"  # nothing to compute, and no grid of no programs
    return impl


# The one door through which kernels get memory: the tests fill it with NaN.
def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: Tensor) -> Tensor:
    """Of x's shape, type and strides."""
    return torch.empty_like(x)


class _Counters:
    """Zeroed int32 on one device. Kernels count in them and put them back to zero, so that no
    launch has to clear any.

    Those used in a graph that is being captured are its own for good: its replays may run beside
    anything. A capture that finds none left clears some of its own, one small node more.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._all = torch.zeros(2, COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once: other streams use them too
        self._next = {False: 0, True: 0}

    def take(self, count: int, captured: bool) -> Tensor | None:
        aligned = -(-count // 4) * 4  # 16 bytes: Triton compiles other code for other pointers
        with self._lock:
            start = self._next[captured]
            if start + aligned > COUNTERS:
                if captured or aligned > COUNTERS:
                    return None
                start = 0
            self._next[captured] = start + aligned
        return self._all[int(captured), start : start + count]


_COUNTERS: dict[torch.device, _Counters] = {}


def _captured(device: torch.device) -> bool:
    """Whether `device`'s current stream is being captured into a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def counters(count: int, device: torch.device) -> Tensor:
    """int32 [count] of zeros that the kernel leaves at zero."""
    captured = _captured(device)
    if device not in _COUNTERS and not captured:
        _COUNTERS[device] = _Counters(device)
    taken = _COUNTERS[device].take(count, captured) if device in _COUNTERS else None
    if taken is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return taken


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter a few, so that work is split there too."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any
) -> None:
    """Run `kernel` over `grid` on `device`'s current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each place once."""
    held = 1
    for stride, size in sorted((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != held:
            return False
        held *= size
    return True
