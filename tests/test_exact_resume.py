"""k steps, a stop and N - k steps are N steps, bit for bit: weights, running statistics, average,
both optimizers, scale, random numbers, feed, counters, statistics and grids.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastgan import checkpoint
from fastgan.cli import main
from test_trainer import FLAGS, only_run, tensors

N = 10  # steps of 8 from 20 images: an epoch ends within step 3 and with step 5
STOPS = {"before the first": 0, "first": 1, "within an epoch": 4, "end of an epoch": 5, "last": N}
LENGTH = ["--kimg=0.08", "--tick-kimg=0.024", "--sample-kimg=0.048", "--flip"]


def wall_clock_aside(run):
    """The rows of stats.jsonl but for what depends on it."""
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    names = ("step", "kimg", "epoch", "d_loss", "g_loss", "d_real", "d_fake")
    names += ("skipped_steps", "diversity")
    return [[row[name] for name in names] for row in rows]


def assert_the_same(a, b):
    """Two run folders, wall clock aside."""
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    metas = [checkpoint.newest(run).meta for run in (a, b)]
    for key in ("step", "images", "feed", "data", "world", "device"):
        assert metas[0][key] == metas[1][key], key
    assert wall_clock_aside(a) == wall_clock_aside(b)
    np.testing.assert_array_equal(np.load(a / "losses.npy"), np.load(b / "losses.npy"))
    for path in (a / "samples").iterdir():  # b has one more, of the step that it stopped at
        assert path.read_bytes() == (b / "samples" / path.name).read_bytes(), path.name
    assert json.loads((a / "run.json").read_text()) == json.loads((b / "run.json").read_text())


def stopped_and_resumed(monkeypatch, out, k, *flags):
    """A run that SIGTERM met after k steps, and the same command again."""
    command = ["train", *FLAGS, *LENGTH, *flags, f"--out={out}", "--resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr("fastgan.trainer.Stop.by", lambda self, step: 15 if step == k else 0)
        assert main(command) == (0 if k == N else 143)
    run = only_run(out)
    assert json.loads((run / "run.json").read_text())["step"] == k
    assert main(command) == 0
    return only_run(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = {}

    def run(*flags):
        if flags not in runs:
            out = tmp_path_factory.mktemp("whole")
            assert main(["train", *FLAGS, *LENGTH, *flags, f"--out={out}"]) == 0
            runs[flags] = only_run(out)
        return runs[flags]

    return run


KINDS = {
    "float32": (),
    "float16": ("--amp", "--amp-dtype=fp16"),
    "bfloat16": ("--amp", "--amp-dtype=bf16"),
    "stream": ("--loader=stream",),
    "options": (
        *("--loss=hinge", "--spectral-norm", "--diffaug", "color", "translation", "cutout"),
        *("--latent-dist=uniform", "--instance-noise=0.2", "--noise-kimg=0.06"),
        *("--r1=1", "--r1-every=3", "--amp", "--amp-dtype=bf16"),
    ),
}


@pytest.mark.parametrize("k", STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, undisturbed, flags, k):
    assert_the_same(undisturbed(*flags), stopped_and_resumed(monkeypatch, tmp_path, k, *flags))


@pytest.mark.slow  # test_trainer.py has a shorter one
@pytest.mark.parametrize("k", STOPS.values(), ids=STOPS)
def test_a_compiled_run_too(tmp_path, monkeypatch, undisturbed, k):
    flags = ("--compile",)
    assert_the_same(undisturbed(*flags), stopped_and_resumed(monkeypatch, tmp_path, k, *flags))


def test_in_new_processes_too(tmp_path, undisturbed):
    command = [sys.executable, "-m", "fastgan", "train", *FLAGS, *LENGTH, f"--out={tmp_path}"]
    for more in (["--kimg=0.032"], ["--resume=auto"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    a, b = tensors(undisturbed()), tensors(only_run(tmp_path))
    different = [name for name in a if not torch.equal(a[name], b[name])]
    # the first part ended, with a tick of its own
    assert not [name for name in different if name != "state.stats.sums"]


def test_the_comparison_sees_one_bit(tmp_path, undisturbed, monkeypatch):
    """And one number that was not put back."""
    kept = checkpoint.Checkpoint.tensors

    def lossy(self, part):
        found = kept(self, part)
        if part == "state":
            found["ema.steps"] += 1
        return found

    monkeypatch.setattr(checkpoint.Checkpoint, "tensors", lossy)
    with pytest.raises(AssertionError):
        assert_the_same(undisturbed(), stopped_and_resumed(monkeypatch, tmp_path, 4))
