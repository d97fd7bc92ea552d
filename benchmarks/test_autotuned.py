"""Whole steps with convolutions that torch.compile has tuned (max_autotune): Triton templates
beside cuDNN, the best of each kept. Minutes to compile.

    pytest benchmarks --benchmark-only -k autotuned
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contenders import Case, Ours, Tuned
from harness import synchronised
from test_steps import WHOLE, compared, floor_ms

GPU = torch.cuda.is_available()
CASE = Case(64, 128)
STRONG = {"amp": torch.bfloat16, "fused": True, "compile": {}, "graph": True}
CONTENDERS = {
    "PyTorch, bf16, max_autotune, graph": partial(Tuned, **STRONG),
    "fastgan, max_autotune": partial(Ours, **WHOLE),
}


@pytest.mark.skipif(not GPU, reason="templates for convolutions are for NVIDIA GPUs")
@pytest.mark.usefixtures("compile_anew")
def test_autotuned(device, copy_gbps, matmul_tflops, record_rows, benchmark, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with torch._inductor.config.patch(max_autotune=True):
        floor = floor_ms(CASE, matmul_tflops, copy_gbps)
        rows, ready = compared(CASE, CONTENDERS, device, floor)
    record_rows("autotuned", rows)
    failed = {row["variant"]: row["reason"] for row in rows if row["ms"] is None}
    assert not failed, failed
    benchmark.pedantic(synchronised(ready["fastgan, max_autotune"]), rounds=5, warmup_rounds=1)
