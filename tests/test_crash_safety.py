"""Nothing that happens while a run is written makes it unreadable: every call that changes a file
fails or is the last one before the process dies, disks are full, processes are killed.
"""

import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from fastgan import checkpoint
from fastgan.cli import main
from fastgan.durable import replace_file
from fastgan.errors import RunError
from fastgan.runlog import Run
from fastgan.stats import COLUMNS, StatsLog

META = {"step": 7, "world": 1, "device": "cpu", "feed": {}, "data": {}, "config": {}}
DIED = 9
CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def parts(seed):
    random = torch.Generator().manual_seed(seed)
    tensors = {f"g.{i}": torch.randn(2000, generator=random) for i in range(3)}
    return {"model": tensors, "optim": dict(tensors), "state": {"random": random.get_state()}}


class Fault:
    """Inside `here`, counts the calls that change a file or a folder, and does `act` in place of
    number `at` (of all from there on, if `stays`); of a write half is done before. Nothing waits
    for the disk.
    """

    def __init__(self, at=None, act=None, stays=False):
        self.at, self.act, self.stays = at, act, stays
        self.names = []

    def met(self, name):
        number = len(self.names)
        self.names.append(name)
        return self.at is not None and (number == self.at or (self.stays and number > self.at))

    @contextmanager
    def here(self):
        real = {name: getattr(os, name) for name in CALLS}
        real_open = open

        def wrapped(name):
            def call(*args, **kwargs):
                if self.met(name):
                    self.act()
                return None if name == "fsync" else real[name](*args, **kwargs)

            return call

        def opened(file, mode="r", *args, **kwargs):
            if set(mode).isdisjoint("wax"):
                return real_open(file, mode, *args, **kwargs)
            if self.met("open"):
                self.act()
            return FaultyFile(real_open(file, mode, *args, **kwargs), self)

        patches = {name: wrapped(name) for name in CALLS}
        with mock.patch.multiple(os, **patches), mock.patch("builtins.open", opened):
            yield self


class FaultyFile:
    """An open file whose writes are counted."""

    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def write(self, content):
        if self.fault.met("write"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.fault.act()
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def failing(number):
    def act():
        raise OSError(number, os.strerror(number))

    return act


def die():
    os._exit(DIED)


def in_a_child(call):
    """Whether a forked process died in `call`."""
    child = os.fork()
    if not child:
        try:
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DIED)
    return code == DIED


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run of two checkpoints, the older the best, with what a kill left of a third."""
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    for images in (1000, 2000, 3000):
        checkpoint.save(run / "checkpoints", images, parts(images), META)
    checkpoint.mark_best(run, run / "checkpoints" / checkpoint.kimg_name(2000), "swd", 9.0)
    leftover = run / "checkpoints" / ".000003.500kimg.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    return run


def save_and_prune(run, images=4000):
    checkpoint.save(run / "checkpoints", images, parts(images), META)
    return checkpoint.prune(run, 2)


def contents(run):
    return {
        path.name: {file.name: file.read_bytes() for file in path.iterdir()}
        for path in checkpoint.checkpoints(run)
    }


def assert_safe(run, before):
    """The older ones are whole, the newest no older, and the next save sweeps and is whole."""
    now = contents(run)
    for path in checkpoint.checkpoints(run):
        checkpoint.open_checkpoint(path)
    ended = "000004.000kimg" in now
    gone = set(before) - set(now)
    assert gone <= ({"000001.000kimg"} if ended else set())  # deleted only for a newer one
    assert all(now[name] == before[name] for name in set(before) - gone)
    assert checkpoint.newest(run).meta["images"] == (4000 if ended else 3000)
    assert checkpoint.best(run).name == "000002.000kimg"
    with Fault().here():
        assert save_and_prune(run, 5000) == []
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    newest = ["000004.000kimg" if ended else "000003.000kimg", "000005.000kimg"]
    assert names == ["000002.000kimg", *newest]
    assert checkpoint.newest(run).path.name == "000005.000kimg"


def every_point(template, tmp_path, call):
    """A fresh copy of the template for each of the calls that `call` makes in it undisturbed."""
    shutil.copytree(template, tmp_path / "undisturbed")
    with Fault().here() as fault:
        call(tmp_path / "undisturbed")
    for at, name in enumerate(fault.names):
        run = tmp_path / f"{at}-{name}"
        shutil.copytree(template, run)
        yield at, name, run


def test_the_faults_are_at_every_call_of_a_save(template, tmp_path):
    names = [name for _, name, _ in every_point(template, tmp_path, save_and_prune)]
    counts = {name: names.count(name) for name in {*CALLS, "write"}}
    # each part: a header and its tensors; then the record
    assert counts["write"] == (1 + 3) + (1 + 3) + (1 + 1) + 1
    assert counts["fsync"] == 4 + 2  # files, the folder, the one around it
    assert counts["mkdir"] == 2  # checkpoints, which is there, and the checkpoint
    assert counts["rename"] == 2  # the checkpoint's, and that of one to be deleted
    assert counts["open"] >= 4 and counts["unlink"] >= 5 and counts["rmdir"] >= 2


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_save_that_fails_anywhere_leaves_the_others(template, tmp_path, number, stays):
    before = contents(template)
    failed = 0
    for at, name, run in every_point(template, tmp_path, save_and_prune):
        try:
            with Fault(at, failing(number), stays).here():
                save_and_prune(run)
        except OSError as error:
            assert error.errno == number
            failed += 1
            if not stays and name != "rmdir":
                left = [p.name for p in (run / "checkpoints").iterdir() if p.name[0] == "."]
                assert not set(left) - {".000003.500kimg.tmp"}, (at, name)
        assert_safe(run, before)
    # but for folders that need not be flushed, and for what is swept and deleted
    assert failed >= 4 + 11 + 4 + 2


def test_a_process_that_dies_anywhere_in_a_save_leaves_the_others(template, tmp_path):
    before = contents(template)
    for at, _, run in every_point(template, tmp_path, save_and_prune):

        def dying(at=at, run=run):
            with Fault(at, die).here():
                save_and_prune(run)

        assert in_a_child(dying)
        assert_safe(run, before)


ROWS = [{name: float(i + k) for k, name in enumerate(COLUMNS)} | {"step": i} for i in range(4)]
SMALL = {
    "run.json": lambda run: Run(run).status("running", 2, 2000),
    "best.json": lambda run: checkpoint.mark_best(run, run / "000003.000kimg", "swd", 8.0),
    "any": lambda run: replace_file(run / "any", b"new" * 10),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", ["fails", "dies"])
def test_a_small_file_is_the_old_one_or_the_new_one(template, tmp_path, name, how):
    write = SMALL[name]
    origin = tmp_path / "origin"
    shutil.copytree(template, origin)
    Run(origin).status("running", 1, 1000)
    (origin / "any").write_bytes(b"old" * 10)
    old = (origin / name).read_bytes()
    for at, call, run in every_point(origin, tmp_path, write):
        new = (tmp_path / "undisturbed" / name).read_bytes()
        assert new != old

        def faulty(at=at, run=run):
            with Fault(at, die if how == "dies" else failing(errno.ENOSPC)).here():
                write(run)

        if how == "dies":
            assert in_a_child(faulty)
        else:
            try:
                faulty()
            except (OSError, RunError):
                assert not list(run.glob(".tmp.*")) or call == "unlink"
        assert (run / name).read_bytes() in (old, new), (at, call)
        write(run)
        assert (run / name).read_bytes() == new and not list(run.glob(".tmp.*"))


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_statistics_that_fail_to_be_written_lose_no_line_before(tmp_path, how):
    origin = tmp_path / "origin"
    origin.mkdir()
    log = StatsLog(origin)
    log.add(ROWS[0]), log.add(ROWS[1])

    def add(run):
        log = StatsLog(run, 1)
        log.add(ROWS[2])
        return log

    for at, call, run in every_point(origin, tmp_path, add):

        def faulty(at=at, run=run):
            with Fault(at, die if how == "dies" else failing(errno.ENOSPC)).here():
                log = StatsLog(run, 1)
                try:
                    log.add(ROWS[2])
                finally:
                    if how == "fails":
                        log.add(ROWS[3])  # writes the one before, too

        if how == "dies":
            assert in_a_child(faulty)
            expected = (2, 3)
        else:
            try:
                faulty()
                expected = (4,)
            except OSError:
                expected = (2, 4)  # it could not be opened, or one was told and the next one well
        read = StatsLog(run, 10)
        assert len(read.rows) in expected and read.rows == ROWS[: len(read.rows)], (at, call)
        np.testing.assert_array_equal(np.load(run / "losses.npy"), read.losses())


TINY = ["--size=32", "--width=4", "--latent=8", "--batch=8", "--grid=4", "--data=faces:20"]
TINY += ["--device=cpu", "--sample-kimg=9"]


CHILDREN = []


def start(out, *flags, **options):
    """`fastgan train` in a process of its own, which writes to `out`.txt."""
    said = open(out.with_suffix(".txt"), "w")  # noqa: SIM115 - the child's
    with said:
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "fastgan", "train", *TINY, f"--out={out}", *flags],
            stdout=said, stderr=subprocess.STDOUT, **options,
        )  # fmt: skip
    CHILDREN.append(child)
    return child


@pytest.fixture(autouse=True)
def no_child_stays():
    yield
    while CHILDREN:
        CHILDREN.pop().kill()
    Forked.end()


FORKS = """if True:
    import json, os, sys
    import fastgan.trainer
    from fastgan.cli import main

    for line in sys.stdin:
        said, *args = json.loads(line)
        child = os.fork()
        if not child:
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os._exit(main(args))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forked:
    """`start` by a fork of a process that has imported everything: two seconds less each. Has what
    is used of subprocess.Popen; one at a time.
    """

    server = None

    def __init__(self, out, *flags):
        if Forked.server is None:
            Forked.server = subprocess.Popen(
                [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        out.with_suffix(".txt").touch()
        command = [str(out.with_suffix(".txt")), "train", *TINY, f"--out={out}", *flags]
        self.server.stdin.write(json.dumps(command).encode() + b"\n")
        self.server.stdin.flush()
        self.pid = int(self.server.stdout.readline())
        self.returncode = None

    def poll(self):
        told = self.server.stdout
        if self.returncode is None and select.select([told], [], [], 0)[0]:
            self.returncode = int(told.readline())
        return self.returncode

    def wait(self, seconds=60):
        if self.poll() is None:
            assert select.select([self.server.stdout], [], [], seconds)[0]
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        self.wait()

    @classmethod
    def end(cls):
        if cls.server is not None:
            cls.server.communicate(timeout=60)
            cls.server = None


def said_by(out):
    return out.with_suffix(".txt").read_text()


def wait_for(true, child, seconds=120):
    """Until `true()`, or the child has ended; whether it is."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def only_run(out):
    (folder,) = out.glob("0*")
    return folder


LIMIT = 64 * 1024  # bytes: less than a checkpoint's parts, more than all else that a run writes
WIDER = ["--width=8", "--tick-kimg=0.08", "--save-kimg=0.08"]


def limited():
    """No file may grow beyond LIMIT, as on a full disk: a write there is EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's prlimit")
@pytest.mark.parametrize("ends", ["full", "mended"])
def test_a_full_disk_is_told_and_ends_a_run_only_with_its_last_checkpoint(tmp_path, ends):
    out = tmp_path / "runs"
    assert main(["train", *TINY, *WIDER, f"--out={out}", "--kimg=0.16"]) == 0
    run = only_run(out)
    before = contents(run)
    kimg = "--kimg=0.48" if ends == "full" else "--kimg=1.6"
    child = start(out, *WIDER, "--resume=auto", kimg, preexec_fn=limited)
    try:
        if ends == "mended":
            assert wait_for(lambda: "could not be written" in said_by(out), child)
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, unlimited)
        child.wait(120)
    finally:
        child.kill()
    said = said_by(out)
    assert "Traceback" not in said
    assert "warning: checkpoint 000000.240kimg could not be written" in said, said
    assert "[Errno 27] File too large" in said and "training goes on" in said
    assert "the newest whole checkpoint: 000000.160kimg" in said
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    if ends == "full":
        assert child.returncode == 1 and "cannot be written" in said
        assert contents(run) == before
        assert json.loads((run / "run.json").read_text())["status"] == "failed"
        assert rows[-1]["kimg"] == 0.48  # it went on to the end
        assert not [p for p in (run / "checkpoints").iterdir() if p.name[0] == "."]
        assert main(["train", *TINY, *WIDER, f"--out={out}", "--resume=auto", "--kimg=0.24"]) == 0
    else:
        assert child.returncode == 0, said
        assert checkpoint.newest(run).meta["images"] == 1600 and rows[-1]["kimg"] == 1.6
        assert json.loads((run / "run.json").read_text())["status"] == "done"


SAVING = ["--save-kimg=0.024", "--tick-kimg=0.04"]
WALL = ("img_per_s", "s_per_kimg", "seconds", "elapsed_s", "gpu_memory_bytes")
STEPS_A_KILL = 45  # more than there are between a start and its kill: 3 x 8, and 0.06 s


def tensors(run):
    found = checkpoint.newest(run)
    return {f"{part}.{k}": t for part in checkpoint.PARTS for k, t in found.tensors(part).items()}


def rows(run):
    lines = (run / "stats.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL} for line in lines]


LONG = pytest.param(200, Forked, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize(("kills", "start_one"), [(5, start), LONG], ids=["5", "200"])
def test_a_run_killed_over_and_over_ends_with_the_same_bits(tmp_path, kills, start_one, capsys):
    """SIGKILL at random; see `kill`."""
    flags = [*SAVING, f"--kimg={8 * STEPS_A_KILL * kills / 1000}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, *flags)
    chance = random.Random(7)
    places, halves = [], 0
    for _ in range(kills):
        child = start_one(killed, *flags, "--resume=auto")
        try:
            run = kill(child, killed, chance)
        finally:
            child.kill()
        assert run is not None, f"ended by itself after {places}: {said_by(killed)}"
        halves += any(name[0] == "." for name in os.listdir(run / "checkpoints"))
        for path in checkpoint.checkpoints(run):
            checkpoint.open_checkpoint(path)
        places.append(checkpoint.newest(run).meta["step"])
    assert places == sorted(places) and len(set(places)) > kills / 3
    last = start(killed, *flags, "--resume=auto")
    assert last.wait(600) == 0, said_by(killed)
    assert undisturbed.wait(600) == 0, said_by(whole)
    run, other = only_run(killed), only_run(whole)  # of each one: no new one was begun
    a, b = tensors(run), tensors(other)
    assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])]
    metas = [checkpoint.newest(r).meta for r in (run, other)]
    assert all(metas[0][key] == metas[1][key] for key in ("step", "images", "feed", "data"))
    assert rows(run) == rows(other)
    np.testing.assert_array_equal(np.load(run / "losses.npy"), np.load(other / "losses.npy"))
    assert not [name for name in os.listdir(run / "checkpoints") if name[0] == "."]
    with capsys.disabled():
        print(f"\n{kills} kills, {halves} of them in a save, at {len(set(places))} steps")


def kill(child, out, chance):
    """Kill a run at random, once it is on its way, and check what it left; None if it ended before.

    Every fourth is hit between its first lines and its first steps; the others some checkpoints
    later, half of them in the midst of one. Until there is a first checkpoint nothing can be gone
    on with, and a new run would be right.
    """
    before = newest_name(out)
    if before and not wait_for(lambda: f"from {before}" in said_by(out), child):
        return None
    if not before or chance.random() < 0.75:
        for _ in range(chance.randint(1, 8)):
            last = newest_name(out)
            if not wait_for(lambda last=last: newest_name(out) != last, child):
                return None
        if chance.random() < 0.5:
            folder = only_run(out) / "checkpoints"
            wait_for(lambda: any(name[0] == "." for name in os.listdir(folder)), child)
    time.sleep(chance.uniform(0, 0.06))
    there = newest_name(out)
    if child.poll() is not None:
        return None
    child.send_signal(signal.SIGKILL)
    child.wait()
    run = only_run(out)
    found = checkpoint.newest(run).path.name
    assert found >= there >= (before or "")
    return run


def newest_name(out):
    found = [p.name for run in out.glob("0*") for p in checkpoint.checkpoints(run)]
    return found[-1] if found else None
