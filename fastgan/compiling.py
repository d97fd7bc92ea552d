"""torch.compile without its silent ways out: a graph break, a reached limit of compilations and a
recompilation in the loop are errors that say where.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import console
from .errors import RunError, UsageError, first_line

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # where PyTorch keeps compiled code
INSTEAD = "train without --compile"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, as a whole and for one shape.

    The threshold keeps the masked gradient of a LeakyReLU from being written out in float32 on its
    way to a batch norm: 10 bytes an element instead of 22.
    """
    _end_workers_at_exit()
    options: dict[str, Any] = {"realize_reads_threshold": 20}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


@functools.cache
def _end_workers_at_exit() -> None:
    """Have PyTorch's compiling processes ended first of all at the end of this one, which waits
    five minutes for those that it has just begun (torch 2.11 on Python 3.12).
    """
    from torch._inductor import async_compile  # what it registers itself is done after this

    def end() -> None:
        with suppress(Exception):  # its names are not public
            for pool in list(async_compile._pool_set):
                if process := getattr(pool, "process", None):  # not of a pool in this process
                    process.terminate()

    atexit.register(end)


def keep_in(folder: Path) -> None:
    """Have compiled code kept in `folder`, so that the next run finds it: PyTorch's own place is
    emptied at a reboot. TORCHINDUCTOR_CACHE_DIR, where it names another one, goes first.

    Raises:
        UsageError: code can be kept nowhere.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    theirs = os.path.abspath(default_cache_dir())  # which PyTorch writes into the environment
    named = os.environ.get(FOLDER, theirs)
    if named == theirs:
        why = _why_no_code(os.path.abspath(folder))
        os.environ[FOLDER] = theirs if why else os.path.abspath(folder)
        if why:
            console.warn(f"compiled code is kept in {theirs}: {why}")
    if why := _why_no_code(os.environ[FOLDER]):
        raise UsageError(f"{FOLDER} must name a folder for --compile: {why}")


def keep_kernels() -> None:
    """Have Triton keep its kernels beside PyTorch's compiled code where its own place, the home
    folder, cannot be written, as in a container. TRITON_CACHE_DIR and TRITON_HOME go first.
    """
    if not {"TRITON_CACHE_DIR", "TRITON_HOME"} & os.environ.keys():
        own = os.path.expanduser("~/.triton")
        if why := _why_not(own):
            from torch._inductor.runtime.cache_dir_utils import cache_dir

            os.environ["TRITON_CACHE_DIR"] = instead = os.path.join(cache_dir(), "triton")
            console.warn(f"Triton's kernels are kept in {instead}: {why}")


def _why_no_code(folder: str) -> str:
    """What keeps PyTorch from compiling in a folder, or ""."""
    if re.search(r"\s", folder):  # it hands the path to the compiler in pieces
        return f"PyTorch cannot compile in a path with a space, {folder}"
    return _why_not(folder)


def _why_not(folder: str) -> str:
    """What keeps files from being written in a folder, or ""."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"


@contextmanager
def explained() -> Iterator[None]:
    """torch.compile's errors in a line, with the place in the code.

    Raises:
        RunError: something could not be compiled.
    """
    exc = torch._dynamo.exc
    # what torch says of a CUDA toolkit without a GPU, whenever it compiles for a CPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.11's advice to let matrix products be TF32, which the start has settled
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            yield
    except exc.FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        reason = f"the limit of {limit} compilations of one function is reached"
        raise RunError(f"torch.compile failed: {reason}, {_where(error)}; {INSTEAD}") from error
    except exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # "backend='inductor' raised:" stands above the reason
        reason = next((x for x in lines if not x.endswith("raised:")), type(error).__name__)
        place = next((line for line in reversed(lines) if line.startswith('File "')), None)
        place = place or _where(error)
        instead = f"{INSTEAD}, or delete the code kept in {os.environ.get(FOLDER)} if it is damaged"
        raise RunError(f"torch.compile failed: {reason}, at {place}; {instead}") from error


def _where(error: BaseException) -> str:
    """The last line outside of torch that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = os.path.dirname(torch.__file__) + os.sep
    ours = [f for f in frames if not f.filename.startswith(theirs)] or frames
    return f'File "{ours[-1].filename}", line {ours[-1].lineno}, in {ours[-1].name}'


@contextmanager
def no_recompiles(active: bool) -> Iterator[None]:
    """Inside, whatever would be compiled once more is an error: everything has been warmed up.

    Raises:
        RunError: something would have been.
    """
    if not active:
        yield
        return
    with torch.compiler.set_stance("fail_on_recompile"):
        try:
            yield
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            raise RunError(
                f"torch.compile would compile again ({first_line(error)}), {_where(error)}; "
                f"{INSTEAD}"
            ) from error
