"""The counters that kernels share, and what they are compiled to for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgan_kernels import _launch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compile_kernels.py"


def test_counters_come_up_again_only_after_all_others():
    counters = _launch._Counters(torch.device("cpu"))
    first = counters.take(3, captured=False)
    second = counters.take(5, captured=False)
    # 16-byte steps: Triton compiles other code for other pointers
    assert second.data_ptr() - first.data_ptr() == 16
    assert first.data_ptr() % 16 == 0 and len(second) == 5
    left = _launch.COUNTERS - 4 - 8
    counters.take(left, captured=False)
    assert counters.take(1, captured=False).data_ptr() == first.data_ptr()


def test_counters_of_a_captured_graph_are_never_given_to_another():
    counters = _launch._Counters(torch.device("cpu"))
    taken = counters.take(_launch.COUNTERS - 4, captured=True)
    last = counters.take(4, captured=True)
    assert counters.take(1, captured=True) is None  # the capture clears some of its own
    eager = counters.take(_launch.COUNTERS, captured=False)
    spans = [(t.data_ptr(), t.data_ptr() + 4 * len(t)) for t in (taken, last, eager)]
    for i, (start, _) in enumerate(spans):
        assert not any(a <= start < b for j, (a, b) in enumerate(spans) if j != i)


def test_more_counters_than_there_are_is_memory_of_its_own():
    many = _launch.counters(_launch.COUNTERS + 1, torch.device("cpu"))
    assert len(many) == _launch.COUNTERS + 1 and not many.any()


def test_without_triton_pytorchs_own_operators_serve():
    code = """
import sys
sys.modules["triton"] = None  # as on a platform that has no wheel of it
import torch
from fastgan_kernels import Adam, BatchNormAct2d, gather_u8
net = BatchNormAct2d(3)
adam = Adam(net.parameters(), lr=0.5)
images = torch.arange(96, dtype=torch.uint8).view(2, 4, 4, 3)
net(gather_u8(images, torch.tensor([1, 0]))).square().sum().backward()
adam.step()
assert (net.weight.abs() - 1).abs().max() > 0.4, net.weight
try:
    BatchNormAct2d(3, impl="triton")(torch.randn(2, 3, 4, 4))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'bn_act: impl="triton" needs the package triton, which is not here' in done.stdout


def compile_kernels(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )


needs_triton = pytest.mark.skipif(_launch.triton is None, reason="no Triton on this platform")


@needs_triton
def test_the_kernels_compile_for_gpus_without_a_spill():
    done = compile_kernels()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    ops = {"bn_act_stats", "bn_act_apply", "bn_act_grad_sums", "bn_act_grad_apply"}
    for op in ops | {"gather_u8", "adam_ema", "guard", "tally"}:
        assert {"80", "90"} <= {word for row in rows if row and row[0] == op for word in row}, op


@needs_triton
@pytest.mark.slow
def test_every_launch_compiles_without_a_spill():
    done = compile_kernels("--all", "--arch", "80", "90", "100")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_a_bad_compilation_is_seen():
    spec = importlib.util.spec_from_file_location("compile_kernels", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    good = tool.Row("bn_act_apply", "bf16", 90, 64, 0, 2048, 12, 4, (12, 4))
    assert tool.faults(good) == []
    for change, words in (
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"registers": 130}, "130 registers"),
        ({"shared_bytes": 50_000}, "50000 bytes of shared memory"),
        ({"wide_loads": 8}, "fewer than 12 loads"),
        ({"wide_stores": 0}, "fewer than 12 loads and 4 stores"),
    ):
        (fault,) = tool.faults(good._replace(**change))
        assert words in fault
    ptx = "ld.global.v4.b32 {a}; @p ld.global.L1::evict_last.v2.b64 {b}; ld.global.v2.b32 {c};"
    assert tool.count_wide("ld", ptx) == 2 and tool.count_wide("st", ptx) == 0
