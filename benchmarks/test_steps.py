"""Whole steps: fastgan's, with each part off in turn, beside the reference and what a user could
build with PyTorch alone (`contenders`).

    pytest benchmarks --benchmark-only -k step

A test is one size and batch; its contenders run interleaved. One that is not right, or cannot be
built, is a row without a figure that says why.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import harness
import pytest
import roofline
import torch
from contenders import Case, Contender, Data, Ours, Tuned, Tutorial, check

GPU = torch.cuda.is_available()
BF16 = torch.bfloat16
REFERENCE = "reference, fp32 (TF32)" if GPU else "reference, fp32"
CASES = [Case(64, 128), Case(64, 1024), Case(128, 64)] if GPU else [Case(32, 8, 16, 8)]
READS = {"realize_reads_threshold": 20}
WHOLE: dict[str, Any] = {"low": BF16, "kernels": "triton", "adam": "triton"}
WHOLE |= {"compile": True, "graph": True}


def contenders() -> dict[str, Callable[[Case, Data], Contender]]:
    """What runs on this machine, by the name of its row."""
    if not GPU:
        return {
            REFERENCE: partial(Tutorial, tf32=True),
            "PyTorch, channels-last": Tuned,
            "PyTorch, channels-last, compiled": partial(Tuned, compile={}, fused=True),
            "fastgan": partial(Ours, one_pass=False),
            "fastgan, one pass": Ours,
            "fastgan, compiled": partial(Ours, one_pass=False, compile=True),
        }
    tuned = partial(Tuned, amp=BF16)
    return {
        REFERENCE: partial(Tutorial, tf32=True),
        "reference, fp32 (no TF32)": partial(Tutorial, tf32=False),
        "PyTorch, bf16": tuned,
        "PyTorch, fp16": partial(Tuned, amp=torch.float16),
        "PyTorch, bf16, compiled": partial(tuned, fused=True, compile={}),
        "PyTorch, bf16, compiled, reads 20": partial(tuned, fused=True, compile=READS),
        "PyTorch, bf16, graph": partial(tuned, fused=True, graph=True),
        "PyTorch, bf16, compiled, graph": partial(tuned, fused=True, compile={}, graph=True),
        "PyTorch, bf16, compiled, reads 20, graph": partial(
            tuned, fused=True, compile=READS, graph=True
        ),
        "fastgan": partial(Ours, **WHOLE),
        "fastgan, not compiled": partial(Ours, **WHOLE | {"compile": False}),
        "fastgan, PyTorch's batch norm": partial(Ours, **WHOLE | {"kernels": "torch"}),
        "fastgan, PyTorch's Adam": partial(Ours, **WHOLE | {"adam": "torch"}),
        "fastgan, two passes": partial(Ours, **WHOLE | {"one_pass": False}),
        "fastgan, no graph": partial(Ours, **WHOLE | {"graph": False}),
        "fastgan, no graph, not compiled": partial(
            Ours, **WHOLE | {"graph": False, "compile": False}
        ),
        "fastgan, fp16": partial(Ours, **WHOLE | {"low": torch.float16}),
        "fastgan, fp32": partial(Ours, **WHOLE | {"low": None}),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, device, copy_gbps, matmul_tflops, record_rows, benchmark, monkeypatch):
    """Milliseconds a step and real images a second; beside the reference, and beside the fastest
    that is not fastgan.
    """
    torch._dynamo.reset()
    # every contender compiles the same functions for networks of its own
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 100)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    data = Data(case, device)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], Any]] = {}
    for name, make in contenders().items():
        row = found[name] = {"case": str(case), "variant": name, "ms": None}
        try:
            before = harness.allocated(device)
            contender = make(case, data)
            row["error"] = check(contender, case, data.real)
            ready[name] = contender.advance
            row["peak_mb"] = harness.peak_mb(contender.advance, before, device)
            row["launches"] = harness.launches(contender.advance, device)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        gc.collect()
    times = harness.interleaved_steps(ready, device)
    strongest = min((t.ms for n, t in times.items() if not n.startswith("fastgan")), default=None)
    floor = None
    if matmul_tflops and copy_gbps:
        floor = roofline.floor_ms(case.batch, matmul_tflops, copy_gbps, case.size)
    for name, t in times.items():
        found[name] |= asdict(t) | {
            "img_per_s": 1000 * case.batch / t.ms,
            "x_reference": times[REFERENCE].ms / t.ms if REFERENCE in times else None,
            "x_strongest": strongest / t.ms if strongest else None,
            "share_of_roofline": floor / t.ms if floor else None,
        }
    record_rows("step", list(found.values()))
    benchmark.extra_info |= {name: t.ms for name, t in times.items()}
    assert ready, f"no contender is right: {found}"
    benchmark.pedantic(
        harness.synchronised(ready.get("fastgan", next(iter(ready.values())))), rounds=5,
        warmup_rounds=1,
    )  # fmt: skip
    failed = {name: row["reason"] for name, row in found.items() if row["ms"] is None}
    assert not failed, failed
