"""The benchmarks can be run and cannot flatter; the published figures are those of the records."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgan.data.images import find_images
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
pictures = load(ROOT / "benchmarks/pictures.py")
own_process = load(ROOT / "benchmarks/own_process.py")
test_data = load(ROOT / "benchmarks/test_data.py")
test_steps = load(ROOT / "benchmarks/test_steps.py")
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the form for machines without a GPU")
@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("kernels and (G1 or gather or adam)", ["G1 8x512x4x4", "gather_u8", "torch fused"]),
        ("convs", ["D2", "G1"]),
        ("step", ["reference, fp32", "PyTorch, channels-last, compiled", "fastgan, one pass"]),
        pytest.param(
            "train or growth",
            ["fastgan train", "share_of_step", "along"],
            marks=pytest.mark.slow,
        ),
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the form for machines without a GPU")
def test_the_data_path_is_measured_without_a_gpu(tmp_path):
    """On a few files: all but the figures."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTGAN_FACES")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/test_data.py", "benchmarks/test_feeds.py",
         "--benchmark-only", "-p", "no:cacheprovider", "--records", tmp_path, "--scale=0.01"],
        cwd=ROOT, capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "fastgan prepare --decoder pillow", "ImageFolder, DataLoader, v2 on tensors",
        "Pillow in threads", "steady_img_per_s", "peak_mb", "first_batch_ms", "--loader dali",
        "share_of_step", "for lack of an NVIDIA GPU",
    ):  # fmt: skip
        assert word in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


def test_squares_that_are_wrong_get_no_figure(tmp_path):
    files = pictures.drawn(tmp_path / "distinct", "PNG", 96)
    expected = np.stack([pictures.framed_ref(file, 32) for file in files])
    assert pictures.check_squares("right", expected, expected) == 0
    near = np.clip(expected.astype(int) + 1, 0, 255).astype(np.uint8)
    mistakes = {
        "another order": expected[::-1],
        "one twice": expected[[0, 0, *range(2, len(expected))]],
        "one missing": expected[1:],
        "BGR": expected[..., ::-1],
        "mirrored": expected[:, :, ::-1],
        "shifted": np.roll(expected, 1, axis=1),
        "a level off": near,
        "in float": expected.astype(np.float32),
    }
    for name, wrong in mistakes.items():
        with pytest.raises(AssertionError, match=name):
            pictures.check_squares(name, wrong, expected)


def test_names_of_one_picture_are_in_the_order_of_fastgan(tmp_path):
    files = pictures.drawn(tmp_path / "distinct", "JPEG", 32)
    paths = pictures.repeated(files, tmp_path / "images", 25, 10)
    assert [p.relative_to(tmp_path / "images").as_posix() for p in paths[::12]] == [
        "00000/000000.jpg", "00010/000012.jpg", "00020/000024.jpg",
    ]  # fmt: skip
    found = find_images(tmp_path / "images")
    assert [file.path for file in found] == list(map(str, paths))
    assert paths[8].read_bytes() == files[1].read_bytes()


def test_photographs_are_copied_and_never_written_to(tmp_path, monkeypatch):
    (own,) = pictures.drawn(tmp_path / "own" / "deep", "JPEG", 32)[:1]
    monkeypatch.setenv("FASTGAN_FACES", str(tmp_path / "own"))
    files, kind = pictures.jpeg_faces(tmp_path / "distinct", 3)
    assert kind == "photographs" and len(files) == 3
    files[0].write_bytes(b"")
    assert own.stat().st_size and own.stat().st_nlink == 1
    monkeypatch.setenv("FASTGAN_FACES", str(tmp_path / "nothing"))
    with pytest.raises(AssertionError, match="FASTGAN_FACES: no .jpg"):
        pictures.jpeg_faces(tmp_path / "none", 3)


def test_the_steady_rate_leaves_the_start_out():
    # two processes that start at 5 s and answer 10 images a second each, 10 at a time
    marks = [(5.0 + (i // 2 + 1), 10) for i in range(12)]
    assert test_data.steady(marks, 2) == pytest.approx(20)
    assert test_data.steady(marks[:5], 2) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_the_process_and_of_those_it_started():
    hold = "import sys; held = bytearray(b'x' * 80_000_000); sys.stdin.read()"
    with own_process.Peak() as peak:
        child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while peak.workers_bytes < 160e6 and time.monotonic() < deadline:
            time.sleep(0.01)
            if (own_process.rss_bytes(str(child.pid)) or 0) > 85e6:
                time.sleep(0.1)
                break
        child.communicate(b"")
    assert 80e6 < peak.workers_bytes < 200e6 and peak.workers == 1
    assert peak.own_bytes > 50e6
    assert peak.total_bytes <= peak.own_bytes + peak.workers_bytes


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


def test_a_graph_is_captured_on_the_stream_of_its_warm_up(monkeypatch):
    """Where cuBLAS has its workspace already: one that is made while capturing is the graph's, and
    used on by others when that is gone.
    """
    warm, captured = [], []
    entered = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def stream(chosen):
        warm.append(chosen)
        yield

    @contextmanager
    def graph(made, pool=None, stream=None):
        captured.append(stream)
        yield

    for name, value in {
        "CUDAGraph": object,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: entered,
        "synchronize": lambda: None,
        "stream": stream,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for _ in range(2):
        harness._captured([lambda: None], 3)
    assert len(captured) == 2 and all(a is b for a, b in zip(warm, captured, strict=True))
    assert captured[0] is not captured[1]


def test_memory_is_the_peak_of_what_is_built(monkeypatch):
    """Beyond what was there, and before anything else is done with it."""
    now, peak, said = 700, 900, []

    def build():
        nonlocal now, peak
        said.append("built")
        now, peak = 1500, 2_000_700
        return "step"

    def start_anew(device):
        nonlocal peak
        peak = now

    for name, value in {
        "empty_cache": lambda: said.append("emptied"),
        "memory_reserved": lambda device: now,
        "max_memory_reserved": lambda device: peak,
        "reset_peak_memory_stats": start_anew,
        "synchronize": lambda device: said.append("done"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert harness.peak_mb(build, torch.device("cuda")) == ("step", 2.0)
    assert said == ["emptied", "built", "done"]
    assert harness.peak_mb(build, CPU) == ("step", None)


def test_measuring_has_no_time_limit(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks/conftest.py").read_text())
    (tmp_path / "test_long.py").write_text(
        "import time\n\n"
        "def test_long(benchmark):\n"
        "    benchmark.pedantic(time.sleep, (0.6,), rounds=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", tmp_path, "--benchmark-only", "--timeout", "0.3",
         "-p", "no:cacheprovider", "--records", tmp_path],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_contender_whose_step_fails_while_it_is_timed_is_dropped():
    calls = iter(range(100))

    def failing():
        if next(calls) == 5:
            raise ValueError("odd\nand more")

    found, ready = {"fails": {}, "goes": {}}, {"fails": failing, "goes": lambda: time.sleep(0.02)}
    times = test_steps.timed(found, ready, CPU)
    assert times.keys() == ready.keys() == {"goes"} and times["goes"].ms >= 20
    assert found == {"fails": {"reason": "ValueError: odd"}, "goes": {}}


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_the_tuned_loop_is_right(low):
    case = contenders.Case(40, 8, 16, 8)
    data = contenders.Data(case, CPU, 50)
    tuned = contenders.Tuned(case, data, amp=low, fused=True)
    assert 0 < contenders.check(tuned, case, data.real) < 0.36
    theirs = [contenders.make_generator(40, 16, 8), contenders.make_discriminator(40, 8)]
    for ours, network in zip(tuned.networks, theirs, strict=True):
        shapes = [{name: t.shape for name, t in n.state_dict().items()} for n in (ours, network)]
        assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])


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
            "share_of_roofline": 0.42 / ms, "low_ms": 0.98 * ms, "high_ms": 1.25 * ms,
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


def training_record():
    told = {"c2st": 0.98, "c2st_low": 0.97, "c2st_high": 0.99}
    rows = [
        {"test": "t", "variant": "fastgan, seed 1", "kimg": 3000.0, "seconds": 33.3, "images": 4890,
         "img_per_s": 109_000.0, "swd_mean": 12.0, "ms_ssim": 0.27, **told},
        {"test": "t", "variant": "reference", "seconds": None, "img_per_s": None, "images": 4890,
         "swd_mean": 28.0, "ms_ssim": 0.32, **told},
    ]  # fmt: skip
    return {**record(), "rows": rows}


def data_records():
    variant = {
        "test": "d",
        "case": "PNG 1024 px",
        "variant": "fastgan prepare",
        "img_per_s": 3200.0,
    }
    rates = {"img_per_s_core": 200.0, "steady_img_per_s": None, "fastgan_x": 1.0}
    slower = {"variant": "Pillow in threads", "steady_img_per_s": 1700.0, "fastgan_x": 2.0}
    feed = {"test": "f", "case": "64 px", "img_per_s": 9000.0, "share_of_step": 0.9}
    memory = {"test": "m", "images": 50_000, "peak_mb": 940.0}
    first = {"test": "b", "case": "70,000 PNGs", "first_batch_ms": 700.0, "process_ms": 2500.0}
    rows = {
        "data": [{**variant, **rates}, {**variant, **rates, **slower}],
        "feeds": [{**feed, "variant": "--loader dali"}],
        "data_memory": [memory],
        "first_batch": [{**first, "variant": "fastgan, prepared"}],
    }
    contents = {name: {**record(), "rows": of} for name, of in rows.items()}
    for content in contents.values():
        content["environment"] |= {"cpu": "A Processor", "cores": 16}
    return contents


def test_the_data_path_stands_beneath_the_steps(tmp_path):
    card = tmp_path / "results" / "a-card"
    assert tables.whole(tmp_path / "results") == tables.NO_STEPS
    contents = data_records()
    for name, content in contents.items():
        harness.write_record(card / f"{name}.json", content)
    text = tables.whole(tmp_path / "results")
    for line in (
        "### A Card, from files to a cache (A Processor, 16 cores)",
        "| PNG 1024 px | fastgan prepare | 3,200 | 200 |  | 1.00 x |",
        "| PNG 1024 px | Pillow in threads | 3,200 | 200 | 1,700 | 2.00 x |",
        "| --loader dali | 9,000 | 90% |",
        "`prepare` and its processes take 940 MB at 50,000 images.",
        "fastgan, prepared: 0.70 s to the first batch of 70,000 PNGs, 2.5 s from the start of",
    ):
        assert line in text, text
    other = {**contents["feeds"], "environment": record("b" * 40)["environment"]}
    harness.write_record(card / "feeds.json", other)
    text = tables.whole(tmp_path / "results")
    assert "--loader dali" not in text and "940 MB" in text


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
        ("growth", growth_record()), ("training", training_record()),
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
        "| `fastgan train --amp` | 126,000 | 24 s | | | |",
        "| fastgan, the step alone | 128,000 (102,400 to 130,612) | 23 s | 6.00 | 2.00 | 42% |",
        "| PyTorch, bf16, graph (the strongest) | 64,000 (51,200 to 65,306) | 47 s | 3.00 | 1.00 |",
        "| reference, fp32 (TF32) | 21,333 (17,067 to 21,769) | 2 min 21 s | 1.00 | 0.33 | 7% |",
        "| fastgan, seed 1 | 33 s: 90,090 img/s | 12.0 | 0.270 | 98.0% (97.0% to 99.0%) |",
        "| reference |  | 28.0 | 0.320 | 98.0% (97.0% to 99.0%) |",
    ):
        assert line in text, text
    assert (card / "step.png").is_file() and (card / "growth.png").is_file()
    every = (card / "README.md").read_text()
    assert "gradients are off by 1" in every and "## growth" in every and "| 0.5 |" in every
    rival = {"test": "64", "case": tables.MAIN_CASE, "variant": "PyTorch, fp16", "ms": None}
    lacking = [*step_record()["rows"], {**rival, "reason": "it ran out of memory"}]
    lacking_record = {**step_record(), "rows": lacking, "note": "Made on a Sunday."}
    harness.write_record(card / "step.json", lacking_record)
    assert report(tmp_path) == 0
    assert "graph (the strongest measured) |" in readme.read_text()
    assert "\nWithout a figure: PyTorch, fp16; it ran out of memory.\n" in readme.read_text()
    assert "Made on a Sunday." in (card / "README.md").read_text()
    harness.write_record(card / "step.json", step_record())
    assert report(tmp_path) == 0
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
