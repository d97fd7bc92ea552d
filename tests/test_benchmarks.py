"""The benchmarks can be run and cannot flatter; the published figures are those of the records."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgan.models import Discriminator, Generator
from planted import EvalInG, FakeFirst, StaleD, Ungrouped

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


roofline = load(ROOT / "benchmarks/roofline.py")
harness, tables = load(ROOT / "benchmarks/harness.py"), load(ROOT / "tools/report_benchmarks.py")
contenders = load(ROOT / "benchmarks/contenders.py")
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the form for machines without a GPU")
@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("kernels and (G1 or gather or adam)", ["G1 8x512x4x4", "gather_u8", "torch fused"]),
        ("convs", ["D2", "G1"]),
        ("step", ["reference, fp32", "PyTorch, channels-last, compiled", "fastgan, one pass"]),
        ("train or growth", ["fastgan train", "share_of_step", "along"]),
    ],
)
def test_the_benchmarks_run_without_a_gpu_and_say_what_is_left_out(which, words, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", which,
         "-p", "no:cacheprovider", "--records", tmp_path],
        cwd=ROOT, capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (*words, "for lack of an NVIDIA GPU"):
        assert word in done.stdout, done.stdout
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


def test_times_of_steps_are_those_of_the_contenders():
    import time

    times = harness.interleaved_steps(
        {"slow": lambda: time.sleep(0.006), "fast": lambda: time.sleep(0.002)}, CPU, 0.02, 3
    )
    assert 6 <= times["slow"].ms < 12 and 2 <= times["fast"].ms < 6


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_contender_that_is_wrong_is_refused(low, monkeypatch):
    case = contenders.Case(32, 8, 16, 8)
    data = contenders.Data(case, CPU, 50)
    right = contenders.Ours(case, data, low=low)
    assert 0 < contenders.check(right, case, data.real) < 0.36
    for mistake in (Ungrouped, FakeFirst, StaleD, EvalInG):
        monkeypatch.setattr(contenders, "Step", mistake)
        wrong = contenders.Ours(case, data, low=low)
        with pytest.raises(AssertionError, match="is off by"):
            contenders.check(wrong, case, data.real)


MACHINE = {"gpu": "A Card", "torch": "2.11", "triton": "3.6", "cuda": "13.0", "driver": "580"}


def record(commit="a" * 40, ours=0.5):
    common = {"test": "G1", "op": "bn_act", "case": "G1", "dtype": "bf16", "share_of_copy": 0.86}
    rows = [
        {**common, "variant": "triton", "ms": ours},
        {**common, "variant": "eager", "ms": 1.0},
        {**common, "test": "G2", "case": "G2", "variant": "triton", "ms": 0.25},
    ]
    machine = {**MACHINE, "commit": commit, "clean": True}
    ceilings = {"copy_gbps": 4300.0, "matmul_tflops": 790.0}
    return {"date": "2026-01-01", "environment": machine, **ceilings, "rows": rows}


def step_record(ours=1.0):
    variants = {"reference, fp32 (TF32)": 6.0, "PyTorch, bf16, graph": 2.0, "fastgan": ours}
    rows = [
        {
            "test": "64", "case": tables.MAIN_CASE, "variant": name, "ms": ms,
            "img_per_s": 128_000 / ms, "x_reference": 6.0 / ms, "x_strongest": 2.0 / ms,
            "share_of_roofline": 0.42 / ms, "memory_mb": 300.0,
        }
        for name, ms in variants.items()
    ]  # fmt: skip
    wrong = {"test": "64", "case": tables.MAIN_CASE, "variant": "fastgan, fp16", "ms": None}
    return {**record(), "rows": [*rows, {**wrong, "reason": "gradients are off by 1"}]}


def growth_record():
    rows = [
        {"test": along, "along": along, "size": 64, "batch": 128, "images": 1000, "ms": 1.0,
         "img_per_s": 128_000.0, "memory_mb": 900.0}
        for along in ("batch", "size", "images")
    ]  # fmt: skip
    return {**record(), "rows": rows}


def train_record():
    row = {"test": "t", "case": tables.MAIN_CASE, "variant": "fastgan train --amp"}
    return {**record(), "rows": [{**row, "img_per_s": 126_000.0}]}


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


def report(root, *more):
    tool = ROOT / "tools" / "report_benchmarks.py"
    return subprocess.run([sys.executable, tool, "--root", root, *more]).returncode


def test_tables_and_plots_say_what_the_records_say(tmp_path):
    card = tmp_path / "benchmarks" / "results" / "a-card"
    (tmp_path / "kernels").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "kernels" / "README.md"):
        path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for name, content in (
        ("kernels", record()), ("step", step_record()), ("train", train_record()),
        ("growth", growth_record()),
    ):  # fmt: skip
        harness.write_record(card / f"{name}.json", content)
    assert report(tmp_path, "--check") == 1
    assert report(tmp_path) == 0 and report(tmp_path, "--check") == 0
    text = (tmp_path / "kernels" / "README.md").read_text()
    assert "| bn_act | G1 | bf16 | 0.5000 | 86% | eager 2.00 |" in text
    assert "A Card" in text and "4,300 GB/s" in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n")
    readme = tmp_path / "README.md"
    text = readme.read_text()
    for line in (
        "| `fastgan train --amp` | 126,000 | | | |",
        "| fastgan, the step alone | 128,000 | 6.00 | 2.00 | 42% |",
        "| PyTorch, bf16, graph (the strongest) | 64,000 | 3.00 | 1.00 | 21% |",
        "| reference, fp32 (TF32) | 21,333 | 1.00 | 0.33 | 7% |",
    ):
        assert line in text, text
    assert (card / "step.png").is_file() and (card / "growth.png").is_file()
    every = (card / "README.md").read_text()
    assert "gradients are off by 1" in every and "## growth" in every and "| 0.5 |" in every
    readme.write_text(text.replace("128,000", "148,000"))
    assert report(tmp_path, "--check") == 1
    assert report(tmp_path) == 0
    harness.write_record(card / "step.json", {**step_record(0.9), "date": "2026-01-02"})
    readme_now = readme.read_text()
    assert report(tmp_path, "--check") == 1 and readme.read_text() == readme_now
    assert report(tmp_path) == 0 and "142,222" in readme.read_text()
    # figures of another commit do not stand beside those of this one
    assert "fastgan train" in readme.read_text()
    other = {**train_record(), "environment": record("b" * 40)["environment"]}
    harness.write_record(card / "train.json", other)
    assert report(tmp_path) == 0 and "fastgan train" not in readme.read_text()
    (card / "step.png").unlink()
    assert report(tmp_path, "--check") == 1  # a plot belongs to its record
    (card / "growth.png").write_bytes(b"no picture")
    assert report(tmp_path, "--check") == 1 and report(tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.md")}
    empty = json.dumps({**step_record(), "rows": []}).encode()
    for damage in (empty, b"{}", b"[]", b"{", b"\xff"):
        (card / "step.json").write_bytes(damage)
        assert report(tmp_path) == 2, damage
    none = step_record()
    for row in none["rows"]:
        row |= {"ms": None, "reason": "no GPU"}
    harness.write_record(card / "step.json", none)  # over a damaged one, which is kept
    assert (card / "step.damaged").is_file()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.md")} == before
    assert report(tmp_path) == 0
    readme.write_text(f"{tables.END}\n{tables.BEGIN}\n")
    assert report(tmp_path) == 2


def test_the_published_figures_are_those_of_the_records():
    assert report(ROOT, "--check") == 0


def test_the_roofline_is_the_work_of_the_step():
    """The figures of the 64 px DCGAN, counted by hand: 1,137.3 M multiply-adds an image."""
    assert roofline.flops() == 2 * 1_137_311_744
    d, g = roofline.layers(64, 100, 64)
    assert sum(x.macs for x in d) == 103_817_216 and sum(x.macs for x in g) == 104_628_224
    assert roofline.parameters(d, d[1:-1]) == 2_765_568
    assert roofline.parameters(g, g[:-1]) == 3_576_704
    floor = roofline.floor_ms(128, 790, 4300)
    assert 128_000 / floor == pytest.approx(305_874, abs=1)  # by bytes
    assert roofline.floor_ms(1024, 790, 4300) == pytest.approx(2.9517, abs=1e-4)
    for size in (32, 56, 64, 128, 256):
        nets = Discriminator(size, 16), Generator(size, 20, 16)
        counted = roofline.layers(size, 20, 16)
        for net, convs, normed in zip(
            nets, counted, (counted[0][1:-1], counted[1][:-1]), strict=True
        ):
            assert roofline.parameters(convs, normed) == sum(p.numel() for p in net.parameters())
