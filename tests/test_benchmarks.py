"""The benchmarks can be run and cannot flatter; the published figures are those of the records."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


harness, tables = load(ROOT / "benchmarks/harness.py"), load(ROOT / "tools/kernel_tables.py")
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the form for machines without a GPU")
def test_the_kernel_benchmarks_run_without_a_gpu_and_say_what_is_left_out(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k",
         "kernels and (G1 or gather or adam)", "-p", "no:cacheprovider", "--records", tmp_path],
        cwd=ROOT, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("G1 8x512x4x4", "gather_u8", "torch fused", "for lack of an NVIDIA GPU"):
        assert words in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())  # a CPU's figures are no record


def measured(variants, outputs=None, limit=1e-6):
    x = torch.randn(1000)
    outputs = outputs or {name: lambda: [x * 2] for name in variants}
    return harness.measure(
        "double", "1000", "fp32", variants, outputs, [x.double() * 2], limit, 8000, CPU, None
    )


def test_a_wrong_variant_gets_no_figure():
    def call(i):
        return lambda: None

    for wrong in (lambda: [torch.zeros(1000)], lambda: [torch.full((1000,), torch.nan)]):
        outputs = {"right": lambda: [torch.zeros(1000)], "wrong": wrong}
        with pytest.raises(
            AssertionError, match=r"double 1000 fp32: relative L2 errors over .*wrong"
        ):
            measured({"right": call, "wrong": call}, outputs)


def test_times_are_those_of_the_variants():
    import time

    def sleeping(ms):
        return lambda i: lambda: time.sleep(ms / 1000)

    rows = {row.variant: row for row in measured({"slow": sleeping(6), "fast": sleeping(2)})}
    assert 6 <= rows["slow"].ms < 12 and 2 <= rows["fast"].ms < 6
    assert rows["fast"].low_ms <= rows["fast"].ms <= rows["fast"].high_ms
    assert rows["fast"].gbps == pytest.approx(8000 / rows["fast"].ms / 1e6)


def record(commit="a" * 40, ours=0.5):
    common = {"op": "bn_act", "case": "G1", "dtype": "bf16", "share_of_copy": 0.86}
    rows = [
        {**common, "variant": "triton", "ms": ours},
        {**common, "variant": "eager", "ms": 1.0},
        {**common, "case": "G2", "variant": "triton", "ms": 0.25},
    ]
    machine = {"gpu": "A Card", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "driver": "580"}
    machine |= {"commit": commit, "clean": True}
    return {"date": "2026-01-01", "environment": machine, "copy_gbps": 4300.0, "rows": rows}


def test_a_record_keeps_what_was_not_measured_again(tmp_path):
    path = tmp_path / "card" / "kernels.json"
    harness.write_record(path, record())
    again = record(ours=0.4)
    again["rows"] = again["rows"][:2]
    harness.write_record(path, again)
    rows = json.loads(path.read_text())["rows"]
    assert sorted((r["case"], r["ms"]) for r in rows) == [("G1", 0.4), ("G1", 1.0), ("G2", 0.25)]
    harness.write_record(path, {**again, **record(commit="b" * 40), "rows": again["rows"]})
    assert len(json.loads(path.read_text())["rows"]) == 2  # another commit's rows are not kept
    for commit, clean in ((None, False), ("b" * 40, False)):  # nor those of who knows what tree
        for content in (record(commit), again):
            content = {**content, "environment": record(commit)["environment"]}
            content["environment"]["clean"] = clean
            harness.write_record(path, content)
        assert len(json.loads(path.read_text())["rows"]) == 2


def test_the_table_says_what_the_record_says(tmp_path):
    harness.write_record(tmp_path / "results" / "card" / "kernels.json", record())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    arguments = ["--readme", readme, "--results", tmp_path / "results"]

    def run(*more):
        tool = ROOT / "tools" / "kernel_tables.py"
        return subprocess.run([sys.executable, tool, *arguments, *more]).returncode

    assert run("--check") == 1
    assert run() == 0 and run("--check") == 0
    text = readme.read_text()
    assert "| bn_act | G1 | bf16 | 0.5000 | 86% | eager 2.00 |" in text
    assert "A Card" in text and "4,300 GB/s" in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n")
    readme.write_text(text.replace("0.5000", "0.4000"))
    assert run("--check") == 1


def test_the_published_figures_are_those_of_the_records():
    text = tables.README.read_text("utf-8")
    assert tables.written(text, tables.RESULTS) == text
