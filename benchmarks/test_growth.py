"""How time and memory grow with the batch, the size of the images and their number.

    pytest benchmarks --benchmark-only -k growth

fastgan's step in bf16 on its kernels as one CUDA graph, each point built, measured and let go; not
compiled by torch.compile, which would take a minute a point. Its memory is `harness.peak_mb`,
without that of the images.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import harness
import pytest
import roofline
import torch
from contenders import Case, Data, Ours, check

GPU = torch.cuda.is_available()
FAST = {"low": torch.bfloat16, "kernels": "triton", "adam": "triton", "graph": True}
# (size, batch, images)
ALONG = {
    "batch": [(64, batch, 10_000) for batch in (32, 64, 128, 256, 512, 1024, 2048)],
    "size": [(size, 64, 10_000) for size in (32, 64, 128, 256)],
    "images": [(64, 128, count) for count in (1000, 10_000, 70_000)],
}
if not GPU:
    FAST = {"one_pass": False}
    ALONG = {
        "batch": [(32, batch, 50) for batch in (4, 8)],
        "size": [(size, 4, 50) for size in (32, 64)],
        "images": [(32, 4, count) for count in (50, 500)],
    }


@pytest.mark.parametrize("along", ALONG)
def test_growth(along, device, copy_gbps, matmul_tflops, record_rows, benchmark, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def point(size: int, batch: int, images: int) -> dict[str, Any]:
        row: dict[str, Any] = {"along": along, "size": size, "batch": batch, "images": images}
        case = Case(size, batch) if GPU else Case(size, batch, 16, 8)
        try:
            data = Data(case, device, images)
            ours, memory_mb = harness.peak_mb(partial(Ours, case, data, **FAST), device)
            row["error"], step = check(ours, case, data.real), ours.advance
            ms = harness.interleaved_steps({"": step}, device, rounds=5)[""].ms
            row |= {"ms": ms, "img_per_s": 1000 * batch / ms, "memory_mb": memory_mb}
            if matmul_tflops and copy_gbps:
                floor = roofline.floor_ms(batch, matmul_tflops, copy_gbps, size)
                row["share_of_roofline"] = floor / ms
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            row |= {"ms": None, "reason": reason[:200]}
        return row

    def sweep() -> list[dict[str, Any]]:
        rows = []
        for size, batch, images in ALONG[along]:
            rows.append(point(size, batch, images))
            record_rows("growth", rows)
            gc.collect()
            torch.cuda.empty_cache()
        return rows

    rows = benchmark.pedantic(sweep, rounds=1)  # pytest-benchmark's time is that of all points
    benchmark.extra_info |= {f"{r['size']} {r['batch']} {r['images']}": r["ms"] for r in rows}
    failed = [row for row in rows if row["ms"] is None and "OutOfMemory" not in row["reason"]]
    assert not failed and any(row["ms"] for row in rows), rows
