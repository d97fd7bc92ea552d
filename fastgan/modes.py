"""How a run computes on the machine at hand: device, precision, kernels, torch.compile and CUDA
graph; each with a line that says what is on, and why not where not.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from fastgan_kernels import INTERPRETED

from . import __version__, console
from .compiling import keep_kernels
from .config import AmpDtype, TrainConfig, recipe_names
from .env import (
    HEADERS,
    commit,
    cpu_flags,
    cxx_compiler,
    driver_cuda,
    machine_line,
    missing,
    missing_for_triton,
    python_headers,
    version_of,
)
from .errors import UsageError

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Modes:
    """What a run's options come to.

    Attributes:
        low: the 16-bit type that the networks compute in; None for float32.
        impl: of the operators, "triton" or "torch".
        compile, graph: whether the step is compiled, and captured as a CUDA graph.
        lines: for each what is on and why, as the start prints them.
    """

    device: torch.device
    low: torch.dtype | None
    impl: str
    compile: bool
    graph: bool
    lines: dict[str, str]


def pick_modes(config: TrainConfig) -> Modes:
    """The modes of a run.

    Raises:
        UsageError: one was asked for by name and cannot be had here.
    """
    device = pick_device(config.device)
    low, precision = pick_precision(config.amp, config.amp_dtype, device)
    impl, kernels = pick_kernels(config.kernels, device)
    compile, compiled = pick_compile(device) if config.compile else (False, "off (--compile)")
    graph, graphed = pick_graph(config.graph, device)
    lines = {"device": device_line(config.device, device), "kernels": kernels}
    lines |= {"precision": precision, "compile": compiled, "graph": graphed}
    return Modes(device, low, impl, compile, graph, lines)


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the GPU where torch can use one."""
    if name == "cpu" or (name == "auto" and why_no_gpu()):
        return torch.device("cpu")
    if why := why_no_gpu():
        raise UsageError(f"--device cuda needs a GPU that torch can use: {why}")
    keep_kernels()
    return torch.device("cuda", torch.cuda.current_device())


def device_line(name: str, device: torch.device) -> str:
    """The device that `--device` came to, and what a GPU lacks where "auto" takes none."""
    if device.type == "cuda" or name == "cpu":
        return f"{device.type} (--device {name})"
    why = why_no_gpu()
    if (
        torch.cuda.is_available() or driver_cuda() is not None
    ):  # there is a card, or was meant to be
        console.warn(f"--device auto takes the CPU: {why}")
    return f"cpu; no GPU: {why}"


def why_no_gpu() -> str:
    """Why torch can use no GPU here, and what to do; "" where it can."""
    if torch.cuda.is_available():
        return _why_unsupported()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    driver = driver_cuda()
    if driver is None:
        return "no NVIDIA driver found (libcuda.so.1)"
    built = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    if driver[0] < built[0]:
        return (
            f"the driver knows CUDA {driver[0]}.{driver[1]}, torch {torch.__version__} is built "
            f"for CUDA {torch.version.cuda}: update the driver, or install torch's "
            f"cu{driver[0]}x build (see the README)"
        )
    return "the driver is there, but no card is visible (CUDA_VISIBLE_DEVICES, container settings)"


def _why_unsupported() -> str:
    """What is wrong with a card that torch has no code for, or ""."""
    major, minor = torch.cuda.get_device_capability()
    for arch in torch.cuda.get_arch_list():  # sm_90 runs on 9.x from 9.0 on, compute_90 on newer
        kind, _, number = arch.partition("_")
        version = int("".join(filter(str.isdigit, number)))
        built = version // 10, version % 10
        if (major, minor) >= built and (kind == "compute" or major == built[0]):
            return ""
    return (
        f"the card is an sm_{major}{minor}, and torch {torch.__version__} has no code for it "
        f"(only for {', '.join(torch.cuda.get_arch_list())}); install a build of torch that has"
    )


def pick_precision(
    amp: bool, name: AmpDtype, device: torch.device
) -> tuple[torch.dtype | None, str]:
    """The 16-bit type that the networks compute in (None: float32).

    Raises:
        UsageError: bf16 was asked for on a card without it.
    """
    if not amp:
        if name != "auto":
            console.warn(f"--amp-dtype {name} does nothing without --amp")
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        how = ", convolutions in TF32 where the card has it (PyTorch's default)" if tf32 else ""
        return None, f"float32{how}"
    kept = "weights, statistics and Adam in float32"
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if name == "bf16" and not has_bf16:
            raise UsageError("--amp-dtype bf16 needs a card of sm_80 or newer: fp16 or auto")
        if name == "fp16" or not has_bf16:
            why = "" if has_bf16 else " (the card is older than sm_80)"
            return torch.float16, f"fp16 with a scaled loss{why}; {kept}"
        return torch.bfloat16, f"bf16; {kept}"
    native = sorted({"avx512_bf16", "amx_bf16"} & cpu_flags())
    if name != "auto":
        slow = "" if native and name == "bf16" else ", which this CPU may only emulate: slow"
        return LOW[name], f"{name} (--amp-dtype){slow}; {kept}"
    if native:
        return torch.bfloat16, f"bf16 ({native[0]}); {kept}"
    return None, "float32: --amp changes nothing on this CPU, which has no bf16 arithmetic"


def pick_compile(device: torch.device) -> tuple[bool, str]:
    """Whether `--compile` can compile on `device`."""
    if device.type == "cuda":
        lack = missing_for_triton()
        return not lack, f"off: needs {lack}" if lack else "on: G, and D with each of the losses"
    named = os.environ.get("CXX")
    compiler = f"a C++ compiler (CXX names {named})" if named else "a C++ compiler (g++)"
    lack = missing((compiler, cxx_compiler()), (HEADERS, python_headers()))
    if lack:
        return False, f"off: torch.compile on a CPU needs {lack}"
    return (
        True,
        "on: G, and D with each of the losses, in C++ (on a CPU seldom faster than without)",
    )


def pick_graph(wanted: bool, device: torch.device) -> tuple[bool, str]:
    """Whether the step is captured as a CUDA graph on `device`."""
    if device.type != "cuda":
        return False, "off: CUDA graphs are for NVIDIA GPUs"
    return wanted, "on: a step is one CUDA graph" if wanted else "off (--no-graph)"


def pick_kernels(name: str, device: torch.device) -> tuple[str, str]:
    """The operators that `--kernels` means on `device`, "triton" or "torch", and a line that says
    which and why.

    Raises:
        UsageError: "triton" where it cannot run.
    """
    why = _why_no_kernels(device)
    if name == "triton" and why:
        raise UsageError(f"--kernels triton: the kernels {why}; auto takes PyTorch's own here")
    if name == "torch":
        return "torch", "PyTorch's own (--kernels torch)"
    if why or (name == "auto" and device.type == "cpu"):
        return "torch", f"PyTorch's own (fastgan's Triton kernels {why or 'are not for a CPU'})"
    how = " in its interpreter: for tests, a thousand times slower" if device.type == "cpu" else ""
    return "triton", f"fastgan's, by Triton {version_of('triton')}{how}"


def _why_no_kernels(device: torch.device) -> str:
    """What the Triton kernels lack on `device`, or ""."""
    if device.type == "cpu":
        return "" if INTERPRETED else "need an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "need a card of sm_80 or newer"
    lack = missing_for_triton()
    return f"need {lack}" if lack else ""


def info(decoder: str) -> str:
    """What `fastgan info` prints: machine, versions, each fast path with what it lacks, the
    recipes.
    """
    device = pick_device("auto")
    lack = missing_for_triton()
    triton_line = (
        f"lacks {lack}"
        if lack
        else f"triton {version_of('triton')}, C compiler and Python headers found"
    )
    rows = [
        ("fastgan", f"{__version__}  (commit {(commit()[0] or 'unknown')[:10]})"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}"),
        ("device", machine_line(device)),
        ("GPU", "in use" if device.type == "cuda" else f"off: {why_no_gpu()}"),
        ("--amp", pick_precision(True, "auto", device)[1]),
        ("--compile", pick_compile(device)[1]),
        ("--kernels", pick_kernels("auto", device)[1]),
        ("--graph", pick_graph(True, device)[1]),
        ("Triton", triton_line),
        ("C++ compiler", cxx_compiler() or "none found: --compile on a CPU needs one"),
        ("decoder", decoder),
        ("recipes", ", ".join(recipe_names())),
    ]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
