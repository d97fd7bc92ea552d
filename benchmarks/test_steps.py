"""Whole steps: fastgan's, with each part off in turn, beside the reference and what a user could
build with PyTorch alone (`contenders`).

    pytest benchmarks --benchmark-only -k step

A test is one size and batch; its contenders run interleaved. One that is not right, or cannot be
built, is a row without a figure that says why.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import roofline
import torch
from contenders import Case, Contender, Data, Ours, Tuned, Tutorial, check
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fastgan.env import cores

GPU = torch.cuda.is_available()
BF16 = torch.bfloat16
REFERENCE = "reference, fp32 (TF32)" if GPU else "reference, fp32"
CASES = [Case(64, 128), Case(64, 1024), Case(128, 64)] if GPU else [Case(32, 8, 16, 8)]
READS = {"realize_reads_threshold": 20}
# Those whose code differs; the others that compile share it with one of these.
DISTINCT = [
    "PyTorch, bf16, compiled",
    "PyTorch, bf16, compiled, reads 20",
    "PyTorch, fp16, compiled, graph",
    "fastgan",
    "fastgan, cuDNN's convolutions",
    "fastgan, PyTorch's batch norm",
    "fastgan, two passes",
    "fastgan, fp16",
    "fastgan, fp32",
]
WHOLE: dict[str, Any] = {"low": BF16, "kernels": "triton", "adam": "triton"}
WHOLE |= {"compile": True, "graph": True}


def contenders() -> dict[str, partial[Contender]]:
    """What runs on this machine, by the name of its row."""
    if not GPU:
        return {
            REFERENCE: partial(Tutorial, tf32=True),
            "PyTorch, channels-last": partial(Tuned),
            "PyTorch, channels-last, compiled": partial(Tuned, compile={}, fused=True),
            "fastgan": partial(Ours, one_pass=False),
            "fastgan, one pass": partial(Ours),
            "fastgan, compiled": partial(Ours, one_pass=False, compile=True),
        }
    tuned = partial(Tuned, amp=BF16)
    return {
        REFERENCE: partial(Tutorial, tf32=True),
        "reference, fp32 (no TF32)": partial(Tutorial, tf32=False),
        "PyTorch, bf16": tuned,
        "PyTorch, fp16": partial(Tuned, amp=torch.float16, fused=True),
        "PyTorch, bf16, compiled": partial(tuned, fused=True, compile={}),
        "PyTorch, bf16, compiled, reads 20": partial(tuned, fused=True, compile=READS),
        "PyTorch, bf16, graph": partial(tuned, fused=True, graph=True),
        "PyTorch, bf16, compiled, graph": partial(tuned, fused=True, compile={}, graph=True),
        "PyTorch, bf16, compiled, reads 20, graph": partial(
            tuned, fused=True, compile=READS, graph=True
        ),
        # cuDNN's batch norm, which PyTorch takes for float16 alone
        "PyTorch, fp16, graph": partial(Tuned, amp=torch.float16, fused=True, graph=True),
        "PyTorch, fp16, compiled, graph": partial(
            Tuned, amp=torch.float16, fused=True, compile={}, graph=True
        ),
        "fastgan": partial(Ours, **WHOLE),
        "fastgan, not compiled": partial(Ours, **WHOLE | {"compile": False}),
        "fastgan, G compiled": partial(Ours, **WHOLE | {"compile": ("_make",)}),
        "fastgan, D compiled": partial(Ours, **WHOLE | {"compile": ("_judge", "_fool")}),
        "fastgan, cuDNN's convolutions": partial(Ours, **WHOLE | {"convs": "torch"}),
        "fastgan, PyTorch's batch norm": partial(
            Ours, **WHOLE | {"kernels": "torch", "convs": "auto"}
        ),
        "fastgan, PyTorch's Adam": partial(Ours, **WHOLE | {"adam": "torch"}),
        "fastgan, two passes": partial(Ours, **WHOLE | {"one_pass": False}),
        "fastgan, no graph": partial(Ours, **WHOLE | {"graph": False}),
        "fastgan, no graph, not compiled": partial(
            Ours, **WHOLE | {"graph": False, "compile": False}
        ),
        "fastgan, fp16": partial(Ours, **WHOLE | {"low": torch.float16}),
        "fastgan, fp32": partial(Ours, **WHOLE | {"low": None}),
    }


def compile_ahead(case: Case) -> None:
    """Build what compiles in processes of their own, all at once, so that this one finds the code
    in PyTorch's cache: one after the other they would take minutes.
    """
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def build(name: str) -> None:
        command = [sys.executable, __file__, str(CASES.index(case)), name]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:  # it is built again below, and says why there
            print(f"not compiled ahead: {name}: {done.stderr.strip().splitlines()[-1:]}")

    harness.reserved(torch.device("cuda"))  # room for theirs
    with ThreadPoolExecutor(max(1, min(len(DISTINCT), cores() - 2))) as pool:
        list(pool.map(build, DISTINCT))
    for choice in Path(cache_dir()).rglob("*.best_config"):
        choice.unlink(missing_ok=True)  # timed beside all the others: to be made again alone


def compared(
    case: Case, makes: dict[str, partial[Contender]], device: torch.device, floor_ms: float | None
) -> tuple[list[dict[str, Any]], dict[str, Callable[[], Any]]]:
    """A row for each contender, and the steps of those that are right and could be timed; says
    whose turn it is.
    """
    data = Data(case, device)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], Any]] = {}
    sixteen: dict[str, bool] = {}  # whether it computes in 16 bits, as the roofline is counted
    for name, make in makes.items():
        row = found[name] = {"case": str(case), "variant": name, "ms": None}
        print(f"{case}: {name}", flush=True)
        try:
            harness.reserved(device)  # room
            contender = make(case, data)
            row["error"] = check(contender, case, data.real)
            sixteen[name] = contender.precision in ("bf16", "fp16")
            ready[name] = contender.advance
        except Exception as error:
            row["reason"] = in_a_line(error)
        gc.collect()
    times = timed(found, ready, device)
    rivals = [name for name in found if not name.startswith("fastgan")]
    # only when all of them could be measured
    strongest = min(times[n].ms for n in rivals) if ready.keys() >= set(rivals) else None
    for name, t in times.items():
        found[name] |= asdict(t) | {
            "img_per_s": 1000 * case.batch / t.ms,
            "x_reference": times[REFERENCE].ms / t.ms if REFERENCE in times else None,
            "x_strongest": strongest / t.ms if strongest else None,
            "share_of_roofline": floor_ms / t.ms if floor_ms and sixteen[name] else None,
        }
    return list(found.values()), ready


def timed(
    found: dict[str, dict[str, Any]], ready: dict[str, Callable[[], Any]], device: torch.device
) -> dict[str, harness.Time]:
    """The times of those that are `ready`, without one whose step fails: it is taken out of them,
    and its row says why.
    """
    running = ""

    def noted(name: str, step: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            nonlocal running
            running = name
            step()

        return call

    while True:
        try:
            steps = {name: noted(name, step) for name, step in ready.items()}
            return harness.interleaved_steps(steps, device)
        except torch.AcceleratorError as error:  # no step runs after it
            error.add_note(f"met when {running} was timed")
            raise
        except Exception as error:
            if running not in ready:  # nothing of a step
                raise
            found[running]["reason"] = in_a_line(error)
            del ready[running]


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def floor_ms(case: Case, matmul_tflops: float | None, copy_gbps: float | None) -> float | None:
    if not (matmul_tflops and copy_gbps):
        return None
    return roofline.floor_ms(case.batch, matmul_tflops, copy_gbps, case.size)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.size}px-b{case.batch}")
@pytest.mark.usefixtures("compile_anew")
def test_step(case, device, copy_gbps, matmul_tflops, record_rows, benchmark, monkeypatch, capfd):
    """Milliseconds a step and real images a second; beside the reference, and beside the fastest
    that is not fastgan.
    """
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if GPU:
        compile_ahead(case)
    floor = floor_ms(case, matmul_tflops, copy_gbps)
    with capfd.disabled():  # a log that is cut off says where
        rows, ready = compared(case, contenders(), device, floor)
    record_rows("step", rows)
    for row in rows:  # a profiler slows what comes after it, and might end it
        if row["ms"] is not None:
            row["launches"] = harness.launches(ready[row["variant"]], device)
    record_rows("step", rows)
    benchmark.extra_info |= {row["variant"]: row["ms"] for row in rows}
    assert ready, f"no contender is right: {rows}"
    first = ready.get("fastgan", next(iter(ready.values())))
    benchmark.pedantic(harness.synchronised(first), rounds=5, warmup_rounds=1)
    failed = {row["variant"]: row["reason"] for row in rows if row["ms"] is None}
    assert not failed, failed


if __name__ == "__main__":  # `compile_ahead`: the number of a case, the name of a contender
    chosen = CASES[int(sys.argv[1])]
    contenders()[sys.argv[2]](
        chosen, Data(chosen, torch.device("cuda" if GPU else "cpu"))
    ).advance()
