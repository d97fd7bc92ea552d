"""The machine: where to run, in which precision, with which fast paths, and why the others are
off.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

from fastgan_kernels import INTERPRETED

from . import __version__
from .config import recipe_names
from .errors import UsageError

HEADERS = "Python's headers (python3-dev)"


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the GPU where torch can use one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda needs a GPU that torch can use: {why_no_gpu()}")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def why_no_gpu() -> str:
    """Why `torch.cuda.is_available()` is false, and what to do."""
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


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the installed driver knows, or None where there is no driver."""
    try:
        lib = ctypes.CDLL("libcuda.so.1" if os.name != "nt" else "nvcuda.dll")
    except OSError:
        return None
    version = ctypes.c_int()
    if lib.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def amp_dtype(device: torch.device) -> tuple[torch.dtype | None, str]:
    """What `--amp` computes in on `device` (None: float32 stays), and a line that says so."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "bf16 where it is safe, float32 weights, statistics and Adam"
        return torch.float16, "fp16 with loss scaling (the card is older than sm_80)"
    native = sorted({"avx512_bf16", "amx_bf16"} & cpu_flags())
    if native:
        return torch.bfloat16, f"bf16 convolutions ({native[0]}), float32 weights and Adam"
    return None, "float32: --amp changes nothing on this CPU, which has no bf16 arithmetic"


def full_line(device: torch.device) -> str:
    """What is computed in without `--amp`."""
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return "float32, convolutions in TF32 where the card has it (PyTorch's default)"
    return "float32"


def compile_line(device: torch.device) -> tuple[bool, str]:
    """Whether `--compile` can compile on `device`, and a line that says what it does."""
    if device.type == "cuda":
        lack = missing_for_triton()
        return not lack, "both networks by torch.compile" if not lack else f"off: needs {lack}"
    lack = _missing(("a C++ compiler (g++)", cxx_compiler()), (HEADERS, python_headers()))
    if lack:
        return False, f"off: torch.compile on a CPU needs {lack}"
    return (
        True,
        "both networks by torch.compile's C++ backend (on a CPU seldom faster than without)",
    )


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


def cpu_flags() -> set[str]:
    """The instruction sets of the CPU, as Linux names them; empty elsewhere."""
    return set(_cpuinfo("flags").split())


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def c_compiler() -> str | None:
    return _first_on_path(os.environ.get("CC"), "gcc", "cc", "clang")


def cxx_compiler() -> str | None:
    return _first_on_path(os.environ.get("CXX"), "g++", "c++", "clang++")


def _first_on_path(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)


def python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def missing_for_triton() -> str:
    """What Triton's first launch would fail for, or ""; it builds its launcher in C."""
    return _missing(
        ("triton", version_of("triton")),
        ("a C compiler (gcc)", c_compiler()),
        (HEADERS, python_headers()),
    )


def _missing(*needs: tuple[str, object]) -> str:
    return " and ".join(name for name, found in needs if not found)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> tuple[str | None, bool]:
    """The git commit of the source tree that runs, and whether it was clean.

    Outside a checkout it is what FASTGAN_COMMIT says, which a copy of a clean tree is given;
    (None, False) without it.
    """
    given = os.environ.get("FASTGAN_COMMIT") or None
    root = Path(__file__).resolve().parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top) != root:  # installed into somebody else's repository
            return given, given is not None
        return _git(root, "rev-parse", "HEAD"), not _git(root, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return given, given is not None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def driver_version() -> str | None:
    """The installed NVIDIA driver, as nvidia-smi names it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions as plain values, for a run's env.json and for records."""
    sha, clean = commit()
    packages = ("torchvision", "triton", "nvidia-dali-cuda120", "numpy", "pillow", "safetensors")
    found: dict[str, Any] = {
        "fastgan": __version__,
        "commit": sha,
        "clean": clean,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "torch": torch.__version__,
        **{name: version_of(name) for name in packages},
        "device": str(device),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known = driver_cuda()
        found |= {
            "gpu": card.name,
            "gpu_memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
            "driver_cuda": f"{known[0]}.{known[1]}" if known else None,
        }
    return found


def machine_line(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"CPU ({cpu_name()}, {cores()} cores)"


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
        ("--amp", amp_dtype(device)[1]),
        ("--compile", compile_line(device)[1]),
        ("--kernels", pick_kernels("auto", device)[1]),
        ("Triton", triton_line),
        ("C++ compiler", cxx_compiler() or "none found: --compile on a CPU needs one"),
        ("decoder", decoder),
        ("recipes", ", ".join(recipe_names())),
    ]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
