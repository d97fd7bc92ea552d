"""The machine: its processors, versions and commit, for lines on the screen and for records."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:  # it takes seconds to import, which `fastgan prepare` has no need for
    import torch

HEADERS = "Python's headers (python3-dev)"


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
    """The one that Triton takes: what CC names, as it stands, else gcc or clang."""
    named = os.environ.get("CC")
    return shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")


def cxx_compiler() -> str | None:
    """The one that torch.compile takes on a CPU: what CXX names, else g++ (clang++ on macOS)."""
    usual = "clang++" if platform.system() == "Darwin" else "g++"
    return shutil.which(os.environ.get("CXX") or usual)


def python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def missing_for_triton() -> str:
    """What Triton's first launch would fail for, or ""; it builds its launcher in C."""
    named = os.environ.get("CC")
    compiler = f"a C compiler (CC names {named})" if named else "a C compiler (gcc)"
    return missing(
        ("triton", version_of("triton")),
        (compiler, c_compiler()),
        (HEADERS, python_headers()),
    )


def missing(*needs: tuple[str, object]) -> str:
    """The names of what was not found, or ""."""
    return " and ".join(name for name, found in needs if not found)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> tuple[str | None, bool]:
    """The git commit of the source tree that runs, and whether it was clean.

    A copy of a clean tree is told its commit by FASTGAN_COMMIT, also where it was laid over a
    checkout of another one (`environment` says so). (None, False) where nothing says it.
    """
    given = os.environ.get("FASTGAN_COMMIT") or None
    root = Path(__file__).resolve().parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top) != root:  # installed into somebody else's repository
            return given, given is not None
        head = _git(root, "rev-parse", "HEAD")
        if given not in (None, head):
            return given, True
        return head, not _git(root, "status", "--porcelain")
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
    import torch

    sha, clean = commit()
    packages = ["torchvision", "triton", "nvidia-dali-cuda120", "kornia-rs", "numpy", "pillow"]
    packages += ["safetensors"]
    found: dict[str, Any] = {
        "fastgan": __version__,
        "commit": sha,
        "clean": clean,
        "commit_named": os.environ.get("FASTGAN_COMMIT") or None,  # by whom made the copy
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
    import torch

    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"CPU ({cpu_name()}, {cores()} cores)"


def memory_line(device: torch.device) -> str:
    """The most memory that was in use on the device so far, in words."""
    import torch

    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"with {peak / 1e9:,.1f} of {total / 1e9:,.1f} GB in use at most"
    try:
        import resource
    except ImportError:  # Windows
        return "on the CPU"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"with {peak / 1e9:,.1f} GB in use at most"
