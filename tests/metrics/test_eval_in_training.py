"""`fastgan train --eval-kimg`: evaluations are those of `fastgan evaluate`, and training is what it
is without them, whatever becomes of one.
"""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from fastgan import checkpoint, distributed, evaluations
from fastgan.charts import DISTANCES
from fastgan.cli import main
from fastgan.config import TrainConfig
from fastgan.errors import UsageError
from fastgan.metrics import c2st, evaluate, inception, ms_ssim, plan, rows, swd
from fastgan.metrics.records import read
from fastgan.run_files import MAX_RECORDS, read_run
from fastgan.trainer import train
from ranks import in_ranks

SHAPE = {"size": 32, "width": 4, "latent": 8, "batch": 8, "grid": 4, "device": "cpu"}
SHAPE |= {"data": "faces:160", "kimg": 0.08, "sample_kimg": 9.0, "tick_kimg": 0.016}
FLAGS = [f"--{key.replace('_', '-')}={value}" for key, value in SHAPE.items()]
EVERY = ["--eval-every=0.032", "--eval-count=70"]  # after 32, 64 and 80 images
CHEAP = ["--eval-metrics", "ms_ssim"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Fewer directions, no Inception in the user's home."""
    monkeypatch.setattr(swd, "DIRECTIONS", 64)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def trained(out, *flags, code=0):
    assert main(["train", *FLAGS, f"--out={out}", *flags]) == code
    (run,) = out.glob("0*")
    return run


def tensors(run):
    found = checkpoint.newest(run)
    return {f"{part}.{k}": v for part in checkpoint.PARTS for k, v in found.tensors(part).items()}


def same(a, b):
    """Whether both runs ended with the same bits, but for the statistics since the last tick."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a if not k.startswith("state.stats"))


def evaluated(run):
    return [record["checkpoint"] for record in read(run / "metrics.jsonl")]


NAMES = ["000000.032kimg", "000000.064kimg", "000000.080kimg"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without evaluations."""
    return trained(tmp_path_factory.mktemp("plain"))


def test_they_are_those_of_evaluate_and_leave_the_training_as_it_is(
    tmp_path, plain, monkeypatch, capsys
):
    drawn, noise = [], evaluate.noise
    monkeypatch.setattr(evaluate, "noise", lambda *args: drawn.append(1) or noise(*args))
    opened, prepare = [], plan.prepare
    monkeypatch.setattr(plan, "prepare", lambda *a, **k: opened.append(1) or prepare(*a, **k))
    metrics = ["swd", "swd_mmagic", "ms_ssim"]
    capsys.readouterr()
    run = trained(tmp_path, *EVERY, "--eval-metrics", *metrics)
    said = capsys.readouterr()
    assert same(run, plain)
    assert evaluated(run) == NAMES and not said.err
    assert len(drawn) == 1 and not opened  # the baselines once, and the set never again
    records = read(run / "metrics.jsonl")
    lines = [line for line in said.out.splitlines() if line.startswith("evaluated ")]
    assert len(lines) == 3 and "took " not in said.out and "record  " not in said.out
    for line, record in zip(lines, records, strict=True):
        of = {row["role"]: row for row in record["rows"]}
        real, model = of["real"], of["model"]
        assert f"SWD {model['swd']['mean']:.2f} (floor {real['swd']['mean']:.2f}), " in line
        mmagic = [of[role]["swd_mmagic"]["mean"] for role in ("model", "real")]
        assert "SWD (mmagic's form) {:.2f} (floor {:.2f}), ".format(*mmagic) in line
        assert f"MS-SSIM {model['ms_ssim']:.3f} (real {real['ms_ssim']:.3f}); best: " in line
        assert model["swd"] != model["swd_mmagic"]
    assert checkpoint.best(run) is not None
    ticks = [json.loads(line) for line in (run / "stats.jsonl").open()]
    assert [row["seconds"]["evaluate"] > 0 for row in ticks] == [False, False, True, False, True]
    # by hand the same numbers come
    path = run / "checkpoints" / NAMES[-1]
    by_hand = ["--count=70", "--device=cpu", "--metrics", *metrics]
    assert main(["evaluate", str(path), *by_hand]) == 0
    assert "SWD (mmagic's form)  32 px (mmagic's form)" in capsys.readouterr().out
    again = read(run / "metrics.jsonl")[3]
    for key in ("rows", "data", "count", "weights_sha256", "path"):
        assert again[key] == records[2][key], key
    # and the page shows all of them
    page = (run / "report.html").read_text()
    assert DISTANCES.title in page and "SWD 32 px (mmagic" in page
    assert [row["kimg"] for row in read_run(run).distances] == [0.032, 0.064, 0.08]


def test_random_numbers_and_cudnn_are_as_they_were():
    state = torch.get_rng_state()
    torch.backends.cudnn.benchmark = True  # conftest's puts it back
    with pytest.raises(ValueError), evaluations._untouched(torch.device("cpu")):
        torch.rand(9)
        assert not torch.backends.cudnn.benchmark
        raise ValueError
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.cudnn.benchmark


REFUSED = [
    (["--eval-metrics", "inception"], "--eval-metrics inception: fid, kid, is"),
    (
        ["--eval-metrics", "ms_ssim", "c2st", "--eval-count=63"],
        "--eval-metrics c2st needs 64 images or more of each set, and there are 63 (--eval-count "
        "63); --eval-metrics ms_ssim can do with them",
    ),
    (
        ["--eval-metrics", "c2st", "--data=faces:126"],
        "--eval-metrics c2st needs 64 images or more of each set, and there are 63 (half of the 12",
    ),
    (
        ["--data=faces:3"],
        "--eval-metrics swd needs 2 images or more of each set, and there are 1 (",
    ),
    (["--loader=dali"], "--eval-kimg needs the images decoded, and --loader dali keeps none"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=lambda value: value[0] + value[-1][-9:])
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(
    tmp_path, capsys, flags, says
):
    out, cache = tmp_path / "runs", tmp_path / "cache"
    given = [*FLAGS, f"--out={out}", f"--cache={cache}", "--eval-kimg=5", *flags]
    assert main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert says in said and "--inception FILE" not in said
    assert not out.exists()
    assert cache.exists() == any("faces:" in flag for flag in flags)  # who has to count decodes


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def no_memory(*args, **kwargs):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def no_room(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def wrong(*args, **kwargs):
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("place", "fails", "says"),
    [
        ("metrics.evaluate.append", full, "metrics.jsonl cannot be written: No space left"),
        ("metrics.rows.diversity", no_memory, "--count 70 takes more memory than there is"),
        ("metrics.rows.diversity", no_room, "fastgan evaluate --device cpu needs none"),
        ("metrics.rows.diversity", wrong, "was not evaluated (division by zero)"),
        ("checkpoint.write_flushed", full, "it was not evaluated, and training goes on"),
    ],
)
def test_one_that_fails_is_a_warning(tmp_path, plain, monkeypatch, capsys, place, fails, says):
    whole, counted = evaluations.Evaluations.evaluate, []

    def evaluate_(self, *args):
        counted.append(1)
        with pytest.MonkeyPatch.context() as patch:
            if len(counted) == 1:
                patch.setattr(f"fastgan.{place}", fails)
            whole(self, *args)

    monkeypatch.setattr(evaluations.Evaluations, "evaluate", evaluate_)
    run = trained(tmp_path, *EVERY, *CHEAP)
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert evaluated(run) == NAMES[1:] and same(run, plain)
    assert json.loads((run / "run.json").read_text())["status"] == "done"


def test_a_signal_ends_one_early_and_the_next_start_makes_up_for_it(
    tmp_path, plain, monkeypatch, capsys
):
    later = []

    class Told(rows.RealSet):
        def __init__(self, *args, progress, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*args, progress=progress, **options)
            later.append(1)

    flags = [*EVERY, "--eval-metrics", "swd", "ms_ssim"]
    with monkeypatch.context() as patch:
        patch.setattr(rows, "RealSet", Told)
        patch.setattr(rows, "diversity", lambda *a, **k: later.append(2))
        run = trained(tmp_path, *flags, code=143)
    said = capsys.readouterr()
    assert not later and evaluated(run) == []
    path = run / "checkpoints" / NAMES[0]
    assert (
        f"{NAMES[0]} was not evaluated: terminated by SIGTERM; fastgan evaluate {path}" in said.out
    )
    assert f"stopped at 0.032 kimg by SIGTERM, saved; fastgan train --resume {run}" in said.out
    assert json.loads((run / "run.json").read_text())["status"] == "preempted"
    assert main(["train", f"--resume={run}"]) == 0
    assert evaluated(run) == NAMES and same(run, plain)


def in_parts(ranks, out, wait_s):
    """A run of several, of whose evaluations the first takes longer than any silence may."""
    measured = []

    def slowly(*args):
        time.sleep(wait_s * (not measured))
        measured.append(1)
        return evaluate.evaluate_by(*args)

    evaluations.evaluate_by = slowly
    distributed.SILENT_S, distributed.BEAT_S = 2 * wait_s / 3, wait_s / 20
    values = {**SHAPE, "out": out, "eval_kimg": 0.032, "eval_count": 70}
    config = TrainConfig(**values, eval_metrics=("ms_ssim",))
    return train(config), len(measured)  # which sees that all ranks have the same weights


def test_the_other_ranks_wait_for_it(tmp_path):
    assert in_ranks(2, in_parts, tmp_path, 3.0, joined=False) == [(0, 3), (0, 0)]
    (run,) = tmp_path.glob("0*")
    assert evaluated(run) == NAMES


def record(kimg, swd_, floor=2.0, **changes):
    means = {"model": swd_, "real": floor}
    rows_ = [{"role": role, "swd": {"mean": mean}} for role, mean in means.items()]
    return {"images_seen": 1000 * kimg, "count": 9, "seed": 0, "rows": rows_, **changes}


def test_the_curve_is_of_all_that_compare(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    lines = [record(kimg, 90 - kimg) for kimg in range(MAX_RECORDS + 9)]
    lines += [record(5, 1.0, count=8), record(7, float("nan")), record(3, "x"), {"rows": [{}, 3]}]
    lines += [
        record(6, 4.0, rows=[{"role": ["model"], "swd": 3}]),
        record(8, 1.0, images_seen=None),
    ]
    lines += [record(4, 50.0, None)]  # once more: the last one counts
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert len(run.records) == MAX_RECORDS
    wanted = [{"kimg": k, "swd": 90 - k, "floor": 2.0} for k in range(MAX_RECORDS + 9)]
    wanted[4] = {"kimg": 4, "swd": 50.0, "floor": None}
    assert run.distances == wanted


def test_the_other_metrics_tell_of_their_work_too(monkeypatch):
    """So that a signal does not wait for the end of one."""
    told, images = [], np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), np.uint8)
    plain = ms_ssim.diversity(images, seed=3)
    assert ms_ssim.diversity(images, seed=3, progress=told.append) == plain
    assert told == [*range(32, 80, 32), 80]  # 16 pairs at a time
    monkeypatch.setattr(c2st, "STEPS", 4)
    told.clear()
    c2st.c2st(images, images[::-1], progress=told.append)
    assert told == [0, 20, 40, 60]


def test_going_on_from_an_earlier_point_sets_aside_what_was_found_after_it(tmp_path, capsys):
    run = trained(tmp_path, "--eval-kimg=0.032", *CHEAP, "--save-kimg=0.032", "--sample-kimg=0.032")
    assert evaluated(run) == NAMES
    early = run / "checkpoints" / NAMES[0]
    flags = [f"--resume={early}", "--lr-g=0.001", "--kimg=0.048", "--eval-kimg=9"]
    assert main(["train", *flags]) == 0
    assert "set aside  2 evaluations" in capsys.readouterr().out
    assert evaluated(run) == [NAMES[0], "000000.048kimg"]
    aside = read(run / "metrics.set-aside.jsonl")
    assert [record["checkpoint"] for record in aside] == NAMES[1:]
    grids = sorted(path.name for path in (run / "samples").glob("fake-*"))
    assert [name[5:15] for name in grids] == ["000000.000", "000000.032", "000000.048"]
    moved = sorted(path.name for path in (run / "samples" / "set-aside").iterdir())
    assert [name[5:15] for name in moved] == ["000000.064", "000000.080"]


def test_inception_where_its_weights_are(monkeypatch):
    monkeypatch.setattr(inception, "find", lambda named: "weights.pth")
    config = TrainConfig(eval_kimg=1, eval_metrics=("inception",))
    evaluations.check_metrics(config)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(UsageError, match="--eval-metrics inception needs torch-fidelity"):
            evaluations.check_metrics(config)
    evaluations.check_metrics(TrainConfig(eval_metrics=("c2st",), eval_count=2))  # never asked
