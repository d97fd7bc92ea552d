"""Whole runs, small: what a run folder holds, and that a stopped run goes on as if it had not
been.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import checkpoint, compiling, modes, recorder
from fastgan.cli import main
from fastgan.config import TrainConfig
from fastgan.data.prepare import default_root, prepare
from fastgan.modes import pick_modes
from fastgan.runlog import Run
from fastgan.signals import Terminated
from fastgan.state import State
from tape import in_the_place_of_cuda

TINY = {"size": 32, "width": 4, "latent": 8, "batch": 8, "grid": 4, "data": "faces:20"}
FLAGS = [f"--{key}={value}" for key, value in TINY.items()]
FLAGS += ["--sample-kimg=9"]  # first and last grid only: each costs a plot
FLAGS += ["--device=cpu"]  # where the same bits come every time


def train(out, *args):
    return main(["train", *FLAGS, f"--out={out}", *args])


def only_run(out):
    (folder,) = out.glob("0*")
    return folder


def tensors(run):
    """Every tensor of the newest checkpoint, by part and name."""
    found = checkpoint.newest(run)
    return {f"{part}.{k}": v for part in checkpoint.PARTS for k, v in found.tensors(part).items()}


def test_lines_of_statistics_in_passes_over_the_set(tmp_path):
    assert train(tmp_path, "--epochs=4", "--tick-epochs=1") == 0  # 20 images, 8 a step
    run = only_run(tmp_path)
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["kimg"] for row in rows] == [0.024, 0.04, 0.064, 0.08]  # the first step behind each
    assert np.load(run / "losses.npy").shape[0] == 4


def test_noise_falls_with_the_images_that_were_seen(tmp_path):
    options = {"instance_noise": 0.4, "noise_kimg": 0.032, "kimg": 1, "device": "cpu"}
    config = TrainConfig(**TINY, **options)
    state = State(config, prepare(config.data, config, root=tmp_path), pick_modes(config))
    met = []
    for _ in range(6):
        state.take(state.feed.next())
        met.append(float(state.step.sight.noise_std))
    np.testing.assert_allclose(met, [0.4, 0.3, 0.2, 0.1, 0, 0], atol=1e-7)


def test_a_run_folder_holds_what_the_design_promises(tmp_path, capsys):
    assert train(tmp_path, "--kimg=0.4", "--tick-kimg=0.08", "--sample-kimg=0.2") == 0
    run = only_run(tmp_path)
    assert run.name == "00000-faces-32px-b8-s999"
    assert json.loads((run / "run.json").read_text()) == {"status": "done", "step": 50, "kimg": 0.4}
    assert json.loads((run / "config.json").read_text())["batch"] == 8
    assert json.loads((run / "env.json").read_text())["torch"] == torch.__version__
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["kimg"] for row in rows] == [0.08, 0.16, 0.24, 0.32, 0.4]
    for row in rows:
        assert row["img_per_s"] > 0 and row["seconds"]["train"] > 0
        assert (
            0 < row["d_real"] < 1 and 0 < row["d_fake"] < 1 and row["epoch"] == row["step"] * 8 / 20
        )
    columns = json.loads((run / "losses.json").read_text())
    losses = np.load(run / "losses.npy", allow_pickle=False)
    assert losses.dtype == np.float32 and losses.shape == (5, len(columns))
    np.testing.assert_array_equal(
        losses, np.array([[row[c] for c in columns] for row in rows], np.float32)
    )
    assert Image.open(run / "losses.png").size == (800, 600)
    names = sorted(p.name for p in (run / "samples").iterdir())
    assert names == [
        "fake-000000.000kimg.png",
        "fake-000000.200kimg.png",
        "fake-000000.400kimg.png",
        "real.png",
    ]
    log = (run / "log.txt").read_text()
    assert "precision  float32" in log and "20 images of 32 px" in log and "done: 0.4 kimg" in log
    assert log in capsys.readouterr().out  # the log is what the user saw
    (last,) = [p for p in checkpoint.checkpoints(run) if p.name == "000000.400kimg"]
    meta = json.loads((last / "meta.json").read_text())
    assert meta["step"] == 50 and set(meta["files"]) == set(checkpoint.PARTS)
    assert meta["feed"] == {"epoch": 20, "offset": 0}


def test_the_statistics_are_the_means_of_the_steps(tmp_path):
    config = TrainConfig(**TINY, kimg=0.08, device="cpu")
    cache = prepare(config.data, config, root=tmp_path)
    state = State(config, cache, pick_modes(config))
    seen = []
    for _ in range(5):
        stats = state.step(state.feed.next())
        state.stats.add(stats, torch.tensor(0))
        seen.append([float(value) for value in stats])
    last = state.stats.last(step=5)
    assert [row.pop("step") for row in last] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([list(row.values()) for row in last], seen, rtol=1e-6)
    means = state.stats.take()
    np.testing.assert_allclose(list(means.values()), np.mean(seen, axis=0), rtol=1e-6)
    assert not state.stats.sums.any()


def test_two_runs_of_one_seed_are_the_same_and_of_two_are_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(tmp_path / name, "--kimg=0.04", f"--seed={seed}") == 0
    a, b, c = (tensors(only_run(tmp_path / name)) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["model.g.last.weight"], c["model.g.last.weight"])


@pytest.mark.parametrize(
    "flags", [[], ["--amp", "--amp-dtype=fp16"], ["--amp", "--amp-dtype=bf16"]]
)
def test_a_resumed_run_in_any_precision_ends_with_the_same_bits(tmp_path, flags):
    """Also the loss scale goes on, and the working copies are written from what was loaded."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *flags, "--kimg=0.12") == 0
    assert train(parts, *flags, "--kimg=0.04") == 0
    assert train(parts, *flags, "--kimg=0.12", "--resume=auto") == 0
    a, b = tensors(only_run(whole)), tensors(only_run(parts))
    assert a.keys() == b.keys() and ("state.loss_scale.scale" in a) == ("--amp-dtype=fp16" in flags)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("first", "then"),
    [("--amp-dtype=fp16", "--amp-dtype=bf16"), ("--amp-dtype=bf16", "--amp-dtype=fp16")],
)
def test_a_run_goes_on_in_another_precision(tmp_path, first, then):
    """From an old card to a new one: the weights are float32 in both."""
    assert train(tmp_path, "--amp", first, "--kimg=0.04") == 0
    run = only_run(tmp_path)
    assert main(["train", f"--resume={run}", then, "--kimg=0.08"]) == 0
    assert ("state.loss_scale.scale" in tensors(run)) == (then == "--amp-dtype=fp16")
    assert main(["train", f"--resume={run}", "--no-amp", "--amp-dtype=auto", "--kimg=0.12"]) == 0
    assert json.loads((run / "run.json").read_text())["step"] == 15


@pytest.mark.parametrize("how", ["auto", "run", "checkpoint"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path, how, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    length = ["--kimg=0.24", "--tick-kimg=0.064", "--save-kimg=0.08", "--sample-kimg=0.24"]
    assert train(whole, *length) == 0
    assert train(parts, *length, "--kimg=0.12") == 0  # ends within a tick and an epoch
    run = only_run(parts)
    where = {"auto": "auto", "run": run, "checkpoint": run / "checkpoints" / "000000.120kimg"}[how]
    # the last tick of the first part was cut short by its end; the undisturbed run has none there
    rows = (run / "stats.jsonl").read_text().splitlines()
    if how == "auto":
        assert train(parts, *length, "--resume=auto") == 0
    else:
        assert main(["train", f"--resume={where}", "--kimg=0.24"]) == 0
    assert only_run(parts) == run
    a, b = tensors(only_run(whole)), tensors(run)
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not [k for k in different if not k.startswith("state.stats")]
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert (run / "stats.jsonl").read_text().splitlines()[: len(rows)] == rows
    grids = [r / "samples" / "fake-000000.240kimg.png" for r in (only_run(whole), run)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_resume_auto_starts_where_nothing_is_and_ends_where_all_is_done(tmp_path, capsys):
    assert train(tmp_path, "--kimg=0.04", "--resume=auto") == 0
    assert "no run of this configuration with a checkpoint" in capsys.readouterr().out
    assert train(tmp_path, "--kimg=0.04", "--resume=auto") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train(tmp_path, "--kimg=0.04", "--resume=auto", "--seed=5") == 0  # another configuration
    assert len(list(tmp_path.glob("0*"))) == 2


def damage(run, name="model.safetensors", keep=0.5):
    path = checkpoint.checkpoints(run)[-1] / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path.parent


def test_a_truncated_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys):
    args = ["--kimg=0.08", "--save-kimg=0.04"]
    assert train(tmp_path, *args) == 0
    run = only_run(tmp_path)
    bad = damage(run)
    capsys.readouterr()
    assert train(tmp_path, "--resume=auto", *args) == 0  # comes by the damaged one's name again
    said = capsys.readouterr()
    assert f"checkpoint {bad} is damaged: model.safetensors has" in said.err
    assert "resumed    from 000000.040kimg" in said.out
    checkpoint.open_checkpoint(bad)
    assert main(["sample", str(run), "--count=1"]) == 0


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path, capsys):
    args = ["--kimg=0.08", "--save-kimg=0.04"]
    assert train(tmp_path, *args) == 0
    run = only_run(tmp_path)
    early, late = run / "checkpoints" / "000000.040kimg", run / "checkpoints" / "000000.080kimg"
    before = checkpoint.open_checkpoint(late).tensors("model")
    assert main(["train", f"--resume={early}", "--lr-g=0.01"]) == 0
    assert "set aside  1 later checkpoints" in capsys.readouterr().out
    after = checkpoint.open_checkpoint(late).tensors("model")
    assert not torch.equal(after["g.last.weight"], before["g.last.weight"])
    kept = checkpoint.open_checkpoint(run / "checkpoints" / "set-aside" / late.name)
    assert all(torch.equal(t, before[k]) for k, t in kept.tensors("model").items())


def test_when_every_checkpoint_is_damaged_the_command_fails_with_their_names(tmp_path, capsys):
    assert train(tmp_path, "--kimg=0.04") == 0
    run = only_run(tmp_path)
    while len(checkpoint.checkpoints(run)) > 1:
        checkpoint.prune(run, 1)
    bad = damage(run)
    for command in (["train", f"--resume={run}"], ["sample", str(run)], ["sample", str(bad)]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert str(bad) in said and "damaged" in said and "Traceback" not in said


def test_a_failing_step_leaves_the_run_marked(tmp_path, monkeypatch):
    def fail(self, batch):
        raise RuntimeError("boom")

    monkeypatch.setattr("fastgan.step.Step.__call__", fail)
    with pytest.raises(RuntimeError, match="boom"):
        train(tmp_path, "--kimg=0.08")
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "failed"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "CPU"])
def test_running_out_of_memory_names_what_to_lower(tmp_path, monkeypatch, capsys, error):
    def fail(self, batch):
        raise error

    monkeypatch.setattr("fastgan.step.Step.__call__", fail)
    assert train(tmp_path, "--kimg=0.08") == 1
    said = capsys.readouterr().err
    assert "out of memory at --batch 8, --size 32, --width 4, --latent 8, with " in said
    assert " GB in use at most: lower one of them (a batch of 4 needs about half) or add" in said


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["checkpoint.write_flushed", "stats.replace_file"])
def test_a_disk_that_stays_full_ends_the_run_with_a_word(tmp_path, monkeypatch, capsys, place):
    """The last checkpoint is what a run must leave, and its files what it must begin with."""
    monkeypatch.setattr(f"fastgan.{place}", full)
    assert train(tmp_path, "--kimg=0.08") == 1
    said = capsys.readouterr().err
    assert f"the run {only_run(tmp_path)} cannot be written: [Errno 28] No space" in said
    assert "Traceback" not in said
    assert list((only_run(tmp_path) / "checkpoints").iterdir()) == []  # nothing half-written
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("place", "lost"),
    [
        ("recorder.save_picture", "fake-000000.040kimg.png"),
        ("stats.StatsLog.plot", "losses.png"),
        ("stats.StatsLog._write_losses", "losses.npy"),
        ("checkpoint.write_flushed", "checkpoint 000000.040kimg"),
    ],
)
def test_a_disk_that_is_full_for_a_while_is_said_and_training_goes_on(
    tmp_path, monkeypatch, capsys, place, lost
):
    assert train(tmp_path / "whole", "--kimg=0.08") == 0
    advance, met, tries = State._advance, threading.Event(), []

    def refuses(*args, **kwargs):
        tries.append(place)
        if len(tries) == (2 if "checkpoint" in place else 1):  # it tries again with what it deleted
            met.set()
        full()

    def fills(self, batch):
        advance(self, batch)
        if self.step_count == 1:
            self.undo = pytest.MonkeyPatch()
            self.undo.setattr(f"fastgan.{place}", refuses)
        elif self.step_count == 6:
            assert met.wait(60)  # checkpoints are written by a thread, which may be late
            self.undo.undo()

    monkeypatch.setattr(State, "_advance", fills)
    flags = ["--kimg=0.08", "--save-kimg=0.04", "--sample-kimg=0.04", "--tick-kimg=0.016"]
    assert train(tmp_path / "full", *flags) == 0
    said = capsys.readouterr().err
    assert lost in said and "No space left on device" in said and "training goes on" in said
    run = only_run(tmp_path / "full")
    a, b = tensors(only_run(tmp_path / "whole")), tensors(run)
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith("state.stats"))
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    np.testing.assert_array_equal(np.load(run / "losses.npy")[:, 0], [2, 4, 6, 8, 10])
    assert json.loads((run / "run.json").read_text())["status"] == "done"


SIGNALS = [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
    (signal.SIGHUP, 129),
    (signal.SIGUSR1, 138),
]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path, number, code):
    flags = [*FLAGS, "--tick-kimg=0.04", "--save-kimg=9"]
    endless = [*flags, "--kimg=1000", f"--out={tmp_path / 'a'}"]
    before = signal.signal(number, signal.SIG_DFL)  # a child under nohup would ignore SIGHUP
    child = subprocess.Popen(
        [sys.executable, "-m", "fastgan", "train", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(number, before)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(0.02)
            found = list((tmp_path / "a").glob("0*/losses.npy"))
            if found and len(np.load(found[0])) >= 3:
                break
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    run = only_run(tmp_path / "a")
    assert child.returncode == code, err
    assert "Traceback" not in err and f"fastgan train --resume {run} goes on" in out
    status = json.loads((run / "run.json").read_text())
    assert status["status"] == "preempted" and status["step"] > 0
    longer = f"--kimg={status['kimg'] + 0.4:g}"
    assert main(["train", f"--resume={run}", longer]) == 0
    assert main(["train", *flags, longer, f"--out={tmp_path / 'b'}"]) == 0
    other = only_run(tmp_path / "b")
    a, b = tensors(run), tensors(other)
    assert all(torch.equal(a[k], b[k]) for k in a)
    np.testing.assert_array_equal(np.load(run / "losses.npy"), np.load(other / "losses.npy"))


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_with_exit_zero_what_a_scheduler_stops_is_no_failure(tmp_path, monkeypatch, number, code):
    monkeypatch.setattr("fastgan.trainer.Stop.by", lambda self, step: number if step else 0)
    scheduler = number in (signal.SIGTERM, signal.SIGUSR1)
    assert train(tmp_path, "--exit-zero") == (0 if scheduler else code)
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "preempted"


def test_a_signal_that_comes_again_when_all_is_saved_is_the_same_one(tmp_path, monkeypatch):
    """Launchers send it twice, and a save may be quick."""
    kept = recorder.Recorder.end

    def again(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        kept(self, *args)

    def first(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            return signal.SIGUSR1
        return 0

    monkeypatch.setattr("fastgan.trainer.Stop.by", first)
    monkeypatch.setattr(recorder.Recorder, "end", again)
    assert train(tmp_path, "--exit-zero") == 0
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "preempted"


def test_a_grid_without_memory_is_missed_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastgan.recorder.generate", fail)
    assert train(tmp_path, "--kimg=0.04") == 0
    assert "no memory for fake-000000.040kimg.png (CUDA out of memory)" in capsys.readouterr().err


def test_a_killed_run_that_had_all_its_images_is_done(tmp_path):
    assert train(tmp_path, "--kimg=0.04") == 0
    path = only_run(tmp_path) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))
    assert train(tmp_path, "--kimg=0.04", "--resume=auto") == 0
    assert json.loads(path.read_text()) == {"status": "done", "step": 5, "kimg": 0.04}


def test_a_run_folder_that_is_moved_away_is_made_anew_and_the_run_is_kept(
    tmp_path, monkeypatch, capsys
):
    advance = State._advance

    def move(self, batch):
        advance(self, batch)
        if self.step_count == 3:
            only_run(tmp_path).rename(tmp_path / "elsewhere")

    monkeypatch.setattr(State, "_advance", move)
    assert train(tmp_path, "--kimg=0.08") == 0
    run = only_run(tmp_path)
    assert "has been moved or emptied: its files are made anew" in capsys.readouterr().err
    monkeypatch.setattr(State, "_advance", advance)
    assert main(["train", f"--resume={run}", "--kimg=0.12"]) == 0
    assert json.loads((run / "run.json").read_text())["step"] == 15


def test_the_same_run_that_another_process_has_begun_is_not_begun_again(tmp_path, capsys):
    """Before its first checkpoint, too, where `--resume auto` finds nothing to go on with."""
    config = TrainConfig(**TINY, sample_kimg=9, kimg=0.04, device="cpu", out=tmp_path)
    begun = Run.create(config)
    assert train(tmp_path, "--kimg=0.04", "--resume=auto") == 1
    said = capsys.readouterr().err
    assert f"{begun.path} is the same run, and in use by process {os.getpid()} on " in said
    begun.close()
    assert train(tmp_path, "--kimg=0.04", "--resume=auto") == 0  # it has ended without one
    assert len(list(tmp_path.glob("0*"))) == 2


def test_a_lock_that_cannot_be_opened_says_what_it_is(tmp_path, capsys):
    assert train(tmp_path, "--kimg=0.04") == 0
    run = only_run(tmp_path)
    (run / "run.lock").unlink()
    (run / "run.lock").mkdir()
    assert main(["train", f"--resume={run}", "--kimg=0.08"]) == 1
    said = capsys.readouterr().err
    assert f"{run / 'run.lock'} cannot be opened (Is a directory): a run is used by one" in said


def test_a_link_to_a_checkpoint_leads_to_its_run(tmp_path):
    assert train(tmp_path, "--kimg=0.04") == 0
    run = only_run(tmp_path)
    (tmp_path / "link").symlink_to(run / "checkpoints" / "000000.040kimg")
    assert main(["train", f"--resume={tmp_path / 'link'}", "--kimg=0.08"]) == 0
    assert json.loads((run / "run.json").read_text())["step"] == 10


def test_a_checkpoint_set_aside_goes_on_in_the_place_of_its_namesake(tmp_path):
    args = ["--kimg=0.08", "--save-kimg=0.04"]
    assert train(tmp_path, *args) == 0
    folder = only_run(tmp_path) / "checkpoints"
    for _ in range(2):  # a second time: what lies aside stays there
        early = folder / "000000.040kimg"
        assert main(["train", f"--resume={early}"]) == 0
    names = sorted(p.name for p in (folder / "set-aside").iterdir())
    assert names == ["000000.080kimg", "000000.080kimg-2"]
    aside = folder / "set-aside" / "000000.080kimg-2"
    assert main(["train", f"--resume={aside}", "--kimg=0.12"]) == 0
    assert (folder / "set-aside" / "000000.080kimg-3").is_dir()  # its namesake


def test_training_goes_on_when_the_reader_of_its_output_goes_away(tmp_path):
    flags = [*FLAGS, "--kimg=0.8", "--sample-kimg=0.08", f"--out={tmp_path}"]
    command = " ".join([sys.executable, "-m", "fastgan", "train", *flags])
    piped = f"{command} | head -2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: stdout is gone (Broken pipe): going on without it" in done.stderr
    run = only_run(tmp_path)
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert "done: 0.8 kimg" in (run / "log.txt").read_text()


def test_a_run_goes_on_from_another_place(tmp_path, monkeypatch, capsys):
    """Moved, with what it was in replaced by a file, its samples gone, from another folder."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    assert main(["faces", "--count=6", "--size=40", f"--out={first / 'images'}"]) == 0
    monkeypatch.chdir(first)
    flags = [f for f in FLAGS if not f.startswith("--data")]
    assert main(["train", *flags, "--data=images", "--kimg=0.04", "--out=my runs"]) == 0
    run = only_run(first / "my runs").rename(second / "the run")
    (first / "my runs").rmdir()
    (first / "my runs").write_text("in the way")
    for path in (run / "samples").iterdir():
        path.unlink()
    (run / "samples").rmdir()
    monkeypatch.chdir(second)
    assert main(["train", "--resume=the run", "--kimg=0.08"]) == 0
    assert [p.name for p in (run / "samples").iterdir()] == ["fake-000000.080kimg.png"]
    monkeypatch.chdir(run / "checkpoints")
    assert main(["train", "--resume=000000.080kimg", "--kimg=0.12"]) == 0
    assert json.loads((run / "run.json").read_text())["kimg"] == 0.12


def test_a_checkpoint_of_another_device_goes_on_with_new_latents(tmp_path, capsys):
    assert train(tmp_path, "--kimg=0.04") == 0
    run = only_run(tmp_path)
    path = checkpoint.checkpoints(run)[-1] / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(checkpoint.sealed(meta | {"device": "cuda"})))
    assert main(["train", f"--resume={run}", "--kimg=0.08"]) == 0
    assert "the run was on cuda: latents go on from a new seed" in capsys.readouterr().err


def test_resume_takes_copied_images_and_refuses_others(tmp_path, capsys):
    folder = tmp_path / "images"
    assert main(["faces", "--count=6", "--size=40", f"--out={folder}"]) == 0
    flags = [f for f in FLAGS if not f.startswith("--data")]
    flags += [f"--out={tmp_path / 'runs'}", f"--data={folder}", "--resume=auto"]
    assert main(["train", *flags, "--kimg=0.04"]) == 0
    for path in folder.iterdir():
        os.utime(path, (1, 1))  # staged anew by the next job
    assert main(["train", *flags, "--kimg=0.08"]) == 0
    assert len(list((tmp_path / "runs").glob("0*"))) == 1
    (folder / "000000.png").unlink()
    assert main(["train", *flags, "--kimg=0.12"]) == 2
    assert "6 images then, 5 now" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    assert main(["faces", "--count=21", "--size=40", f"--out={folder}"]) == 0
    return folder


def test_every_loader_gives_the_same_run(tmp_path, pictures, capsys):
    flags = [f for f in FLAGS if not f.startswith("--data")] + ["--flip"]
    flags += [f"--data={pictures}", "--holdout=0.2"]
    for name in ("resident", "stream", "dali"):
        out = f"--out={tmp_path / name}"
        assert main(["train", *flags, out, f"--loader={name}", "--kimg=0.08"]) == 0
    other = [*flags, f"--out={tmp_path / 'dali'}", "--resume=auto", "--kimg=0.12"]
    assert main(["train", *other]) == 0  # from one loader to another
    said = capsys.readouterr().out
    assert "loader     the set is resident as a memory map" in said
    assert "loader     the set is streamed from its memory map" in said
    assert "loader     each batch is decoded on the fly by" in said
    whole = f"--out={tmp_path / 'whole'}"
    assert main(["train", *flags, whole, "--kimg=0.12"]) == 0
    runs = [tensors(only_run(tmp_path / name)) for name in ("resident", "stream", "dali", "whole")]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert all(torch.equal(runs[3][k], runs[2][k]) for k in runs[3])
    pictures_ = [only_run(tmp_path / name) / "samples" / "real.png" for name in ("stream", "dali")]
    assert pictures_[0].read_bytes() == pictures_[1].read_bytes()


def test_bad_files_while_training_on_the_fly(tmp_path, pictures, capsys):
    folder = tmp_path / "images"
    shutil.copytree(pictures, folder)
    for name in ("000003.png", "000004.png", "000011.png"):
        (folder / name).write_bytes(b"text")
    flags = [f for f in FLAGS if not f.startswith("--data")] + ["--loader=dali"]
    flags += [f"--data={folder}", f"--out={tmp_path / 'runs'}"]
    assert main(["train", *flags, "--kimg=0.08"]) == 0
    run = only_run(tmp_path / "runs")
    said = capsys.readouterr().err
    assert said.count("not an image: the next image stands in for it") == 1
    assert main(["train", *flags, "--kimg=0.12", "--resume=auto"]) == 0
    lines = (run / "skipped.jsonl").read_text().splitlines()
    names = sorted(json.loads(line)["name"] for line in lines)
    assert names == ["000003.png", "000004.png", "000011.png"]
    assert main(["train", *flags, "--kimg=0.16", "--resume=auto", "--loader=auto"]) == 2
    assert "18 images by --loader auto and --decoder auto, and had 21 by dali and auto" in (
        capsys.readouterr().err
    )
    assert main(["train", *flags, "--on-bad=stop", "--kimg=0.04"]) == 2
    assert "text" not in (said := capsys.readouterr().err) and "--on-bad skip puts others" in said


def test_a_folder_that_vanishes_while_it_is_read_ends_with_a_checkpoint(
    tmp_path, pictures, monkeypatch, capsys
):
    folder = tmp_path / "images"
    shutil.copytree(pictures, folder)
    advance = State._advance

    def vanish(self, batch):
        advance(self, batch)
        if self.step_count == 4:
            for path in folder.iterdir():
                path.unlink()

    monkeypatch.setattr(State, "_advance", vanish)
    flags = [f for f in FLAGS if not f.startswith("--data")] + ["--loader=dali"]
    assert main(["train", *flags, f"--data={folder}", f"--out={tmp_path}", "--kimg=9"]) == 1
    run = only_run(tmp_path)
    said = capsys.readouterr().err
    assert (
        "of 21 images in" in said and "saved at 0.0" in said and f"--resume {run} goes on" in said
    )
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    shutil.copytree(pictures, folder, dirs_exist_ok=True)
    monkeypatch.setattr(State, "_advance", advance)
    step = json.loads((run / "run.json").read_text())["step"]
    assert step >= 5
    assert main(["train", f"--resume={run}", f"--kimg={(step + 2) * 8 / 1000}"]) == 0


def test_a_run_in_use_is_refused(tmp_path, capsys):
    from fastgan.runlog import Run

    assert train(tmp_path, "--kimg=0.04") == 0
    run = only_run(tmp_path)
    held = Run(run)
    assert main(["train", f"--resume={run}", "--kimg=0.08"]) == 1
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    held.close()
    assert main(["train", f"--resume={run}", "--kimg=0.08"]) == 0


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fastgan.lock.fcntl.flock", no_locks)
    assert train(tmp_path, "--kimg=0.04") == 0
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_a_run_on_the_kernels_and_its_checkpoint_without_them(tmp_path, monkeypatch, capsys):
    """The same run folder, near the same losses; a checkpoint of either goes on with the other."""
    losses = {}
    for kernels in ("triton", "torch"):
        out = tmp_path / kernels
        flags = ["--kimg=0.032", "--tick-kimg=0.008", f"--kernels={kernels}"]
        assert train(out, *flags) == 0
        losses[kernels] = np.load(only_run(out) / "losses.npy")
        words = "fastgan's, by Triton" if kernels == "triton" else "PyTorch's own (--kernels torch)"
        assert words in (only_run(out) / "log.txt").read_text()
    # from one seed: before float32's roundings part them (tests/equality.py), the same numbers
    np.testing.assert_allclose(losses["triton"][0], losses["torch"][0], rtol=1e-3)
    np.testing.assert_allclose(losses["triton"], losses["torch"], rtol=0.2)
    names = {k: set(tensors(only_run(tmp_path / k))) for k in losses}
    assert names["triton"] == names["torch"]
    for kernels, other in (("triton", "torch"), ("torch", "triton")):
        run = only_run(tmp_path / kernels)
        before = tensors(run)
        steps = {float(t) for name, t in before.items() if name.endswith(".step")}
        assert steps == {4.0} and float(before["state.ema.steps"]) == 4.0
        more = ["--kimg=0.048", f"--kernels={other}", f"--resume={run}"]
        assert main(["train", *more]) == 0
        assert f"kernels: {kernels} -> {other}" in capsys.readouterr().out
        after = tensors(run)
        assert {float(t) for name, t in after.items() if name.endswith(".step")} == {6.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no stand-in")
def test_a_run_on_a_graph_is_the_run_without(tmp_path, monkeypatch, capsys):
    """The trainer's own capture, with a tape in the place of CUDA's graph: resume included."""
    flags = ["--tick-kimg=0.024", "--kimg=0.12"]  # three steps a tick
    assert train(tmp_path / "plain", *flags) == 0
    in_the_place_of_cuda(monkeypatch)
    monkeypatch.setattr(modes, "pick_graph", lambda wanted, device: (wanted, "a tape"))
    assert train(tmp_path / "graph", *flags, "--kimg=0.048") == 0
    assert train(tmp_path / "graph", *flags, "--resume=auto") == 0
    assert "graph      a tape" in capsys.readouterr().out
    a, b = (tensors(only_run(tmp_path / name)) for name in ("plain", "graph"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [np.load(only_run(tmp_path / name) / "losses.npy") for name in ("plain", "graph")]
    assert losses[0].shape == (5, 6)
    np.testing.assert_array_equal(*losses)


def test_a_compiled_run_ends_with_the_same_bits_and_goes_on_from_a_plain_one(
    tmp_path, monkeypatch, capsys
):
    """Its warm-up trains nothing, its code is kept, and nothing may be compiled in its loop."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    loops, no_recompiles = [], compiling.no_recompiles
    monkeypatch.setattr(
        compiling, "no_recompiles", lambda on: (loops.append(on), no_recompiles(on))[1]
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--kimg=0.08", "--compile") == 0
    assert train(parts, "--kimg=0.04", "--compile") == 0
    assert train(parts, "--kimg=0.08", "--compile", "--resume=auto") == 0
    a, b = tensors(only_run(whole)), tensors(only_run(parts))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "after a warm-up of" in capsys.readouterr().out and loops == [True] * 3
    kept = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert kept == default_root() / "compiled" and any(kept.iterdir())
    resume = f"--resume={only_run(parts)}"
    assert main(["train", resume, "--kimg=0.12", "--no-compile"]) == 0
    assert main(["train", resume, "--kimg=0.16", "--compile"]) == 0
    out = capsys.readouterr().out
    assert "compile: True -> False" in out and "compile: False -> True" in out
    assert json.loads((only_run(parts) / "run.json").read_text())["step"] == 20


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_in_the_warm_up_ends_it_at_once(tmp_path, monkeypatch, capsys, number, code):
    """There is nothing to save yet, and a compiler may take a minute."""

    def interrupted(self):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(State, "warm_up", interrupted)
    assert train(tmp_path, "--kimg=0.04") == code
    assert json.loads((only_run(tmp_path) / "run.json").read_text())["status"] == "preempted"
    assert "ended at once, not saved; the newest checkpoint is not there" in capsys.readouterr().err


def test_what_a_signal_breaks_in_code_that_swallows_it_is_told_as_the_signal(
    tmp_path, monkeypatch, capsys
):
    def broken(self):
        with suppress(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        raise AttributeError("half of a module")

    monkeypatch.setattr(State, "warm_up", broken)
    assert train(tmp_path, "--kimg=0.04") == 143
    assert "terminated by SIGTERM" in capsys.readouterr().err


def test_resume_auto_takes_a_run_by_other_code_and_names_what_else_differs(tmp_path, capsys):
    assert train(tmp_path, "--kimg=0.04") == 0
    assert train(tmp_path, "--kimg=0.08", "--no-graph", "--kernels=torch", "--resume=auto") == 0
    assert len(list(tmp_path.glob("0*"))) == 1
    assert train(tmp_path, "--kimg=0.08", "--amp", "--lr-g=1e-4", "--resume=auto") == 0
    assert "is nearest, but for --amp, --lr-g" in capsys.readouterr().out
    assert len(list(tmp_path.glob("0*"))) == 2
