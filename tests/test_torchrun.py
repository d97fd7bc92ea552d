"""`fastgan train` in several processes: by torchrun as it is, and by hand where torchrun would only
start them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan import checkpoint
from fastgan.cli import main
from ranks import Command, command, free_port

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")

TINY = ["--size=32", "--width=4", "--latent=8", "--batch=8", "--grid=4", "--data=faces:20"]
TINY += ["--device=cpu", "--sample-kimg=9", "--tick-kimg=0.04"]
BATCH = 8
ENDLESS = "--kimg=100000"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
GONE_S = 60  # for all to end once one is gone; a few seconds on a machine that is idle


def kimg(steps):
    return f"--kimg={steps * BATCH / 1000:g}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--cache={tmp_path_factory.mktemp('cache')}"


@contextmanager
def torchrun(said, *args):
    """torchrun with `fastgan train ARGS`, whose output goes into the file `said`."""
    with open(said, "w") as file:
        child = subprocess.Popen([*TORCHRUN, *args], stdout=file, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        for pid in descendants(child.pid):
            os.kill(pid, signal.SIGKILL)
        child.wait()


def descendants(pid):
    """The processes below one that are there, it included while it is waited for."""
    found = [pid]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return [pid for pid in found if Path(f"/proc/{pid}").exists()]


def worker(launcher, rank):
    """The process id of a rank that torchrun has started."""
    for pid in descendants(launcher)[1:]:
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError(f"rank {rank} is not there")


def only_run(out):
    (run,) = out.glob("0*")
    return run


def wait_for(what, alive):
    """Until a run has it."""
    deadline = time.monotonic() + 120
    while not what():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.02)


def ticked(out):
    """Whether the run in `out` has a line of statistics."""
    return any(path.stat().st_size for path in out.glob("0*/stats.jsonl"))


def saved(out):
    """Whether it has a checkpoint."""
    return any(map(checkpoint.looks_whole, out.glob("0*/checkpoints/0*")))


def run_json(run):
    return json.loads((run / "run.json").read_text())


def steps_of(run):
    lines = (run / "stats.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def tensors(run):
    found = checkpoint.newest(run)
    return {f"{part}.{k}": t for part in checkpoint.PARTS for k, t in found.tensors(part).items()}


def assert_same_run(mine, theirs):
    """Weights, moments, random numbers, statistics: bit for bit."""
    a, b = tensors(mine), tensors(theirs)
    assert a.keys() == b.keys() and len(a) > 50
    for name, t in a.items():
        assert t.dtype == b[name].dtype and torch.equal(t, b[name]), name
    feeds = [checkpoint.newest(run).meta["feed"] for run in (mine, theirs)]
    assert feeds[0] == feeds[1]
    losses = [np.load(run / "losses.npy") for run in (mine, theirs)]
    np.testing.assert_array_equal(*losses)
    assert len(losses[0])


def train(folder, world, *flags, **options):
    """What `fastgan train` in `world` processes by hand says, when it ends well."""
    codes, lines = command(folder, world, "train", *TINY, f"--out={folder}", *flags, **options)
    assert codes == [0] * world, "\n".join(lines)
    return lines


def own_words(lines):
    return [line for line in lines if line.startswith("fastgan: ")]


STEPS = 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run by torchrun in two processes, and what it said."""
    out = tmp_path_factory.mktemp("whole")
    args = ["--standalone", "--nproc-per-node=2", "-m", "fastgan", "train", *TINY, cache]
    with torchrun(out / "said", *args, f"--out={out}", "--save-kimg=0.08", kimg(STEPS)) as child:
        code = child.wait(120)
    said = (out / "said").read_text()
    assert code == 0, said
    return only_run(out), said


def test_two_processes_make_one_run_and_say_each_line_once(whole):
    run, said = whole
    lines = said.splitlines()
    assert "rank 1" not in said and "Traceback" not in said and not own_words(lines)
    assert [line for line, count in Counter(lines).items() if count > 1] == []
    (line,) = [line for line in lines if line.startswith("processes")]
    assert line.startswith("processes  2 by gloo, 4 images each; batch norm by ")
    # its log has what was said from where it was opened on
    log = (run / "log.txt").read_text().splitlines()
    assert log == lines[-len(log) :]
    assert run_json(run) == {"status": "done", "step": STEPS, "kimg": STEPS * BATCH / 1000}
    assert steps_of(run) == [5, 10, 15, 20, 25]
    saved = [path.name for path in checkpoint.checkpoints(run)]
    assert saved == ["000000.080kimg", "000000.160kimg", "000000.200kimg"]
    assert {checkpoint.find(path).meta["world"] for path in checkpoint.checkpoints(run)} == {2}


def test_processes_started_by_hand_make_the_same_run(whole, cache, tmp_path):
    flags = ["train", *TINY, cache, f"--out={tmp_path}", kimg(STEPS)]
    with Command(tmp_path, 2, *flags) as started:
        assert started.codes() == [0, 0], started.lines()
        assert started.lines(1) == []
    assert_same_run(only_run(tmp_path), whole[0])


def test_sigterm_to_torchrun_stops_both_at_one_step_and_the_run_goes_on_exactly(cache, tmp_path):
    out = tmp_path / "stopped"
    out.mkdir()
    args = ["--standalone", "--nproc-per-node=2", "-m", "fastgan", "train", *TINY, cache]
    with torchrun(tmp_path / "said", *args, f"--out={out}", ENDLESS) as child:
        wait_for(lambda: ticked(out), lambda: child.poll() is None)
        child.send_signal(signal.SIGTERM)
        code = child.wait(GONE_S)
    said = (tmp_path / "said").read_text()
    # torchrun ends with its own SignalException, whatever its processes end with: a scheduler
    # reads run.json
    assert code == 1 and "SignalException" in said
    run = only_run(out)
    ended = run_json(run)
    assert ended["status"] == "preempted" and ended["step"] >= 5
    assert checkpoint.newest(run).meta["step"] == ended["step"]
    assert said.count("by SIGTERM, saved; fastgan train --resume ") == 1
    assert "rank 1" not in said and not own_words(said.splitlines())
    total = kimg(ended["step"] + 15)
    train(out, 2, cache, "--resume=auto", total)
    train(tmp_path / "whole", 2, cache, total)
    assert_same_run(run, only_run(tmp_path / "whole"))


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_stops_and_saves_both(rank, cache, tmp_path):
    flags = ["train", *TINY, cache, f"--out={tmp_path}", ENDLESS]
    with Command(tmp_path, 2, *flags) as started:
        wait_for(lambda: ticked(tmp_path), started.all_alive)
        os.kill(started.children[rank].pid, signal.SIGTERM)
        assert started.codes(GONE_S) == [143, 143], started.lines()
        assert started.lines(1) == []
        assert "by SIGTERM, saved" in started.lines(0)[-1]
    run = only_run(tmp_path)
    assert run_json(run)["status"] == "preempted"
    assert checkpoint.newest(run).meta["step"] == run_json(run)["step"]


def gone_on(out, *flags):
    """The run in `out` and its steps, once it has gone on from a whole checkpoint, which it has."""
    run = only_run(out)
    kept = checkpoint.newest(run)
    for path in checkpoint.checkpoints(run):
        checkpoint.open_checkpoint(path)
    lines = train(out, 2, *flags, "--resume=auto", kimg(kept.meta["step"] + 5))
    assert f"resumed    from {kept.path.name}" in lines
    assert run_json(run)["status"] == "done"
    assert steps_of(run)[-1] == kept.meta["step"] + 5
    return run, kept.meta["step"] + 5


@pytest.mark.slow
def test_after_kill_9_of_a_process_of_torchruns_all_end_and_the_run_goes_on(cache, tmp_path):
    out = tmp_path / "killed"
    out.mkdir()
    args = ["--standalone", "--nproc-per-node=2", "-m", "fastgan", "train", *TINY, cache]
    flags = [f"--out={out}", "--save-kimg=0.04", ENDLESS]
    with torchrun(tmp_path / "said", *args, *flags) as child:
        wait_for(lambda: saved(out), lambda: child.poll() is None)
        pids = [worker(child.pid, rank) for rank in range(2)]
        os.kill(pids[1], signal.SIGKILL)
        assert child.wait(GONE_S) == 1
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    said = (tmp_path / "said").read_text()
    assert "fastgan/trainer.py" not in said  # there is a traceback, of torchrun's own
    gone_on(out, cache)


@pytest.mark.parametrize(("rank", "norm"), [(1, "--no-sync-bn"), (0, "--sync-bn")])
def test_after_kill_9_without_torchrun_the_other_ends_too(rank, norm, cache, tmp_path):
    flags = ["train", *TINY, cache, f"--out={tmp_path}", "--save-kimg=0.04", norm, ENDLESS]
    with Command(tmp_path, 2, *flags) as started:
        wait_for(lambda: saved(tmp_path), started.all_alive)
        os.kill(started.children[rank].pid, signal.SIGKILL)
        began = time.monotonic()
        codes = started.codes(GONE_S)
        print(f"rank {rank} was killed; the other ended after {time.monotonic() - began:.1f} s")
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
        (line,) = own_words(started.lines(1 - rank))
        assert "Traceback" not in "\n".join(started.lines(1 - rank))
        assert "another process of the run has ended" in line and "its own last lines" in line
        if rank == 1:  # rank 0 keeps the place where such signs are left
            assert "rank 1 gives no sign of life" in line
    run, steps = gone_on(tmp_path, cache, norm)
    train(tmp_path / "whole", 2, cache, norm, kimg(steps))
    assert_same_run(run, only_run(tmp_path / "whole"))


LIMIT = 64 * 1024  # bytes: less than a checkpoint's parts, more than all else that a run writes


def test_a_last_checkpoint_that_cannot_be_written_ends_both_and_is_said_once(cache, tmp_path):
    flags = ["train", *TINY, "--width=8", cache, f"--out={tmp_path}", kimg(12), "--save-kimg=9"]
    codes, lines = command(tmp_path, 2, *flags, file_limit=LIMIT)
    assert codes == [1, 1], lines
    (line,) = own_words(lines)
    assert "cannot be written" in line and "File too large" in line and "rank" not in line
    run = only_run(tmp_path)
    assert run_json(run)["status"] == "failed" and checkpoint.checkpoints(run) == []
    assert steps_of(run)[-1] == 12


# Another number of processes.


def test_another_number_of_processes_is_refused_unless_it_is_asked_for(cache, tmp_path):
    train(tmp_path, 2, cache, kimg(7))
    run = only_run(tmp_path)
    flags = ["train", *TINY, cache, f"--out={tmp_path}", "--resume=auto"]
    before = tensors(run)
    codes, lines = command(tmp_path, 1, *flags, kimg(14))
    assert codes == [2]
    (line,) = own_words(lines)
    assert "in 2 processes, and this is 1 process" in line and "--elastic" in line
    codes, lines = command(tmp_path, 4, *flags, kimg(14))
    assert codes == [2] * 4
    (line,) = own_words(lines)
    assert "in 2 processes, and this is 4 processes" in line and "rank" not in line
    assert all(torch.equal(t, before[name]) for name, t in tensors(run).items())
    for world, steps in ((1, 14), (2, 21), (4, 28)):
        codes, lines = command(tmp_path, world, *flags, kimg(steps), "--elastic")
        assert codes == [0] * world, lines
        (line,) = [line for line in lines if line.startswith("elastic")]
        assert "not the same bits" in line
        assert run_json(run) == {"status": "done", "step": steps, "kimg": steps * BATCH / 1000}
        assert checkpoint.newest(run).meta["world"] == world
        epoch, offset = divmod(steps * BATCH, 20)
        assert checkpoint.newest(run).meta["feed"] == {"epoch": epoch, "offset": offset}
    assert steps_of(run) == [5, 7, 10, 14, 15, 20, 21, 25, 28]


def test_with_sync_bn_two_processes_begin_as_one_does(cache, tmp_path):
    """The same images and latents; float32's order of summation lets them go apart."""
    first = {}
    for world in (1, 2):
        train(tmp_path / f"{world}", world, cache, "--sync-bn", kimg(5))
        first[world] = np.load(only_run(tmp_path / f"{world}") / "losses.npy")[0]
    np.testing.assert_allclose(first[2], first[1], rtol=0, atol=1e-4)
    train(tmp_path / "own", 2, cache, kimg(5))
    own = np.load(only_run(tmp_path / "own") / "losses.npy")[0]
    assert np.abs(own - first[1]).max() > 1e-4  # batch norm of each one's share is another run


# The command line.


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        (["--batch=9"], {}, "--batch must be a multiple of the 2 processes"),
        (["--batch=2"], {}, "--batch must be a multiple of the 2 processes, at least 2 for each"),
        (["--kimg=-1"], {}, "--kimg"),
        (["--data=nowhere"], {}, "--data"),
        (["--resume=nowhere"], {}, "--resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_for_all_is_said_once(flags, environment, named, cache, tmp_path):
    flags = ["train", *TINY, cache, *flags, *([] if "--kimg=-1" in flags else [kimg(5)])]
    if "--resume=nowhere" not in flags:
        flags += [f"--out={tmp_path / 'runs'}"]
    codes, lines = command(tmp_path, 2, *flags)
    assert codes == [2, 2]
    (line,) = own_words(lines)
    assert named in line and "rank 1" not in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": None},
        {"LOCAL_RANK": "first"},
        {"LOCAL_WORLD_SIZE": None},
        {"RANK": "7"},
    ],
    ids=str,
)
def test_a_launchers_variables_that_are_wrong_end_a_process_at_once(environment, cache, tmp_path):
    flags = ["train", *TINY, cache, f"--out={tmp_path / 'runs'}", kimg(5)]
    codes, lines = command(tmp_path, 1, *flags, environment={0: {"WORLD_SIZE": "2", **environment}})
    assert codes == [2]
    ((name, value),) = environment.items()
    (line,) = lines
    assert line.startswith("fastgan: several processes need RANK, ") and f"{name}={value}" in line


# Where the images come from.


@pytest.mark.slow
def test_every_loader_gives_two_processes_the_same_run(cache, tmp_path):
    faces = tmp_path / "faces"
    assert main(["faces", "--count=20", "--size=32", f"--out={faces}"]) == 0
    runs = []
    for loader in ("resident", "stream", "dali"):
        out = tmp_path / loader
        lines = train(out, 2, cache, f"--data={faces}", f"--loader={loader}", kimg(15))
        (line,) = [line for line in lines if line.startswith("loader")]
        named = {"resident": "resident", "stream": "streamed", "dali": "on the fly"}[loader]
        assert named in line
        runs.append(only_run(out))
    for other in runs[1:]:
        assert_same_run(other, runs[0])


# Several machines.


@pytest.mark.slow
def test_two_nodes_make_one_run(whole, cache, tmp_path):
    out = tmp_path / "runs"
    out.mkdir()
    args = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=1"]
    args += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "-m", "fastgan", "train", *TINY, cache]
    args += [f"--out={out}", kimg(STEPS)]
    said = [tmp_path / "said.0", tmp_path / "said.1"]
    with torchrun(said[0], *args) as one, torchrun(said[1], *args) as other:
        codes = [one.wait(120), other.wait(120)]
    texts = [path.read_text() for path in said]
    assert codes == [0, 0], texts
    assert_same_run(only_run(out), whole[0])  # which rank a node has is torchrun's affair
    spoke = [text for text in texts if "processes  2 by gloo" in text]
    assert len(spoke) == 1 and sum("done: " in text for text in texts) == 1
