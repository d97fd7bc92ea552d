"""Saving beside training: the copy is of one moment, nothing that the thread met gets lost, and
nobody waits longer than asked.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastgan import checkpoint, saving
from fastgan.saving import Saver

META = {"step": 7, "world": 1, "device": "cpu", "feed": {"epoch": 1}, "data": {}, "config": {}}
GPU = torch.cuda.is_available()


def tensors(device="cpu"):
    """Of all that a trainer has: channels-last weights, one step count of two names, a state."""
    step = torch.tensor(3.0, device=device)
    weight = torch.randn(8, 4, 3, 3, device=device).to(memory_format=torch.channels_last)
    return {
        "model": {"g.weight": weight, "g.seen": torch.tensor(5, device=device)},
        "optim": {
            "g.a.step": step,
            "g.b.step": step,
            "g.a.exp_avg": torch.randn(64, 64, device=device),
        },
        "state": {
            "random.latents": torch.Generator().get_state(),
            "sums": torch.randn(3, dtype=torch.float64, device=device),
            "none": torch.empty(0, device=device),
        },
    }


def spoil(parts):
    """What the next step does: everything changes in place."""
    for tensor in {id(t): t for part in parts.values() for t in part.values()}.values():
        tensor.add_(1)


def snapshot(parts):
    return {
        part: {k: t.detach().cpu().clone() for k, t in ts.items()} for part, ts in parts.items()
    }


def assert_holds(path, expected):
    found = checkpoint.open_checkpoint(path)
    for part, ts in expected.items():
        read = found.tensors(part)
        assert read.keys() == ts.keys()
        for name, t in ts.items():
            assert read[name].dtype == t.dtype and torch.equal(read[name], t), name


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.fixture
def saver(run):
    made = Saver(run, keep=2)
    yield made
    made.close()


@pytest.fixture
def disk(monkeypatch):
    """`checkpoint.save`, which waits when `open` is cleared and raises what `error` holds."""
    state = SimpleNamespace(open=threading.Event(), error=None, calls=0)
    state.open.set()
    real = checkpoint.save

    def save(*args):
        state.calls += 1
        state.open.wait(60)
        if state.error is not None:
            raise state.error
        return real(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    yield state
    state.open.set()


def place(run, images):
    return run / "checkpoints" / checkpoint.kimg_name(images)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_is_of_the_moment_of_begin(run, saver, disk, device):
    parts, meta = tensors(device), {**META, "feed": {"epoch": 1}}
    for images in (1000, 2000):  # in new memory, and in that of the save before
        disk.open.clear()
        expected = snapshot(parts)
        saver.begin(images, parts, meta)
        spoil(parts)
        meta["feed"]["epoch"] += 1
        assert not place(run, images).exists()
        disk.open.set()
        saver.finish()
        assert_holds(place(run, images), expected)
        epoch = images // 1000
        assert checkpoint.open_checkpoint(place(run, images)).meta["feed"] == {"epoch": epoch}


def test_the_copys_memory_is_taken_once(run, saver):
    parts, places = tensors(), set()
    for images in (1000, 2000, 3000):
        saver.begin(images, parts, META)
        saver.finish()
        places.add(saver._staging._host.data_ptr())
    assert len(places) == 1
    parts["model"]["g.more"] = torch.randn(100, 100)
    saver.begin(4000, parts, META)
    saver.finish()
    assert_holds(place(run, 4000), parts)


def test_begin_and_collect_do_not_wait_for_the_disk(run, saver, disk, capsys):
    disk.open.clear()
    saver.begin(1000, tensors(), META)
    saver.collect()
    assert checkpoint.checkpoints(run) == []
    disk.open.set()
    saver.finish()
    assert checkpoint.checkpoints(run) == [place(run, 1000)]
    assert capsys.readouterr().err == ""


def test_begin_waits_for_the_save_before(run, saver, disk):
    disk.open.clear()
    first = tensors()
    saver.begin(1000, first, META)
    threading.Timer(0.2, disk.open.set).start()
    began = time.monotonic()
    saver.begin(2000, tensors(), META)
    assert time.monotonic() - began > 0.15 and place(run, 1000).exists()
    saver.finish()
    assert_holds(place(run, 1000), first)


def ended(saver):
    assert saver._save.ended.wait(30)


@pytest.mark.parametrize("how", ["collect", "begin"])
def test_a_save_that_failed_is_told_and_the_next_is_made(run, saver, disk, capsys, how):
    saver.begin(1000, tensors(), META)
    saver.finish()
    disk.error = FULL
    saver.begin(2000, tensors(), META)
    ended(saver)
    assert capsys.readouterr().err == ""  # not from the thread
    disk.error = None
    if how == "collect":
        saver.collect()
    else:
        saver.begin(3000, tensors(), META)
    said = capsys.readouterr().err
    for words in (
        "warning: checkpoint 000002.000kimg could not be written",
        "[Errno 28] No space left on device",
        "training goes on and will save again at the next interval",
        "the newest whole checkpoint: 000001.000kimg",
    ):
        assert words in said
    saver.begin(4000, tensors(), META)
    saver.finish()  # a good one came after: nothing to raise
    assert place(run, 4000).exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("collected", [False, True])
def test_when_the_last_save_fails_finish_raises(run, saver, disk, capsys, collected):
    disk.error = FULL
    saver.begin(1000, tensors(), META)
    ended(saver)
    if collected:
        saver.collect()
        assert "(the newest whole checkpoint: none)" in capsys.readouterr().err
    for _ in range(2):  # as long as no later one is whole
        with pytest.raises(OSError, match="No space left"):
            saver.finish()
    saver.close()
    assert capsys.readouterr().err == ""
    disk.error = None
    saver.begin(2000, tensors(), META)
    saver.finish()


@pytest.mark.parametrize("how", ["collect", "begin", "finish"])
@pytest.mark.parametrize("error", [KeyError("model"), MemoryError()], ids=repr)
def test_a_bug_in_the_thread_is_raised(run, saver, disk, how, error):
    disk.error = error
    saver.begin(1000, tensors(), META)
    ended(saver)
    args = (2000, tensors(), META) if how == "begin" else ()
    with pytest.raises(type(error)):
        getattr(saver, how)(*args)


def test_what_is_too_many_makes_room_on_a_full_disk(tmp_path, monkeypatch):
    """`--keep-checkpoints` was lowered, and the disk is full before it was heeded."""
    for images in (1000, 2000, 3000, 4000):
        checkpoint.save(tmp_path / "checkpoints", images, tensors(), META)
    kept = checkpoint.save

    def full(*args):
        if len(checkpoint.checkpoints(tmp_path)) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return kept(*args)

    monkeypatch.setattr(checkpoint, "save", full)
    saver = Saver(tmp_path, 2)
    saver.begin(5000, tensors(), META)
    saver.finish()
    saver.close()
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["000004.000kimg", "000005.000kimg"]


def test_close_waits_tells_and_does_not_raise(run, saver, disk, capsys):
    disk.open.clear()
    disk.error = KeyError("model")
    saver.begin(1000, tensors(), META)
    threading.Timer(0.2, disk.open.set).start()
    thread = saver._thread
    saver.close()
    # one that still frees its tensors while Python ends makes torch abort (14 times in 200)
    assert not thread.is_alive()
    assert "warning: the checkpoint was not written: KeyError: 'model'" in capsys.readouterr().err
    saver.close()
    Saver(run, 2).close()  # that never saved
    assert capsys.readouterr().err == ""


def test_a_signal_ends_the_wait_at_once(run, saver, disk):
    """What Ctrl-C raises the second time; `close` then does not wait either."""
    disk.open.clear()
    saver.begin(1000, tensors(), META)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            saver.finish()
        saver.close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5


def test_a_process_that_is_told_twice_does_not_wait_for_its_disk(run):
    code = """if True:
        import signal, sys, time
        from pathlib import Path
        from contextlib import closing
        import torch
        from fastgan import checkpoint
        from fastgan.saving import Saver

        def save(folder, images, parts, meta):
            (folder / ".half.tmp").mkdir()
            time.sleep(300)

        checkpoint.save = save
        with closing(Saver(Path(sys.argv[1]), 2)) as saver:
            saver.begin(1000, {p: {} for p in checkpoint.PARTS}, {})
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            print("waiting", flush=True)
            saver.finish()
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60
    )
    assert "waiting" in done.stdout and done.returncode != 0
    assert done.stderr.strip().endswith("KeyboardInterrupt")
    assert (run / "checkpoints" / ".half.tmp").exists()
    with_saver = Saver(run, 2)
    with_saver.begin(1000, tensors(), META)
    with_saver.finish()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["000001.000kimg"]


def test_a_process_that_ends_in_the_midst_of_a_save_is_not_aborted(run):
    """Every call of torch that lets go of Python's lock may end a process whose Python ends."""
    code = """if True:
        import os, random, sys, time
        from pathlib import Path
        import torch
        from fastgan import checkpoint
        from fastgan.saving import Saver

        tensors = {f"g.{i}": torch.randn(20000) for i in range(300)}
        chance = random.Random(0)
        for i in range(8):
            delay = chance.uniform(0, 0.1)
            if not (child := os.fork()):
                break
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            sys.exit()
        saver = Saver(Path(sys.argv[1]), 2)
        saver.begin(1000 * i, dict.fromkeys(checkpoint.PARTS, tensors), {})
        time.sleep(delay)
        sys.exit(7)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["7"] * 8, done.stderr


def test_older_checkpoints_are_deleted_but_for_the_best(run, saver):
    for images in (1000, 2000, 3000, 4000):
        saver.begin(images, tensors(), META)
        saver.finish()
        if images == 1000:
            checkpoint.mark_best(run, place(run, 1000), "swd", 9.5)
    names = [p.name for p in checkpoint.checkpoints(run)]
    assert names == ["000001.000kimg", "000003.000kimg", "000004.000kimg"]


def test_what_cannot_be_deleted_is_told_once(run, saver, monkeypatch, capsys):
    def refused(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("fastgan.checkpoint.shutil.rmtree", refused)
    for images in (1000, 2000, 3000, 4000, 5000):
        saver.begin(images, tensors(), META)
        saver.finish()
    said = capsys.readouterr().err
    assert said.count("could not be deleted ([Errno 13] Permission denied") == 1
    assert str(place(run, 1000)) in said and place(run, 5000).exists()


class LateCopies:
    """`torch.cuda`'s streams and events without a GPU: a copy that is not waited for has not
    happened until its event is.
    """

    def __init__(self, monkeypatch, full=False):
        self.queued, self.held, self.waits = [], [], []
        self.current = SimpleNamespace(name="current", wait_stream=None)
        self.side = SimpleNamespace(name="side", wait_stream=self.waits.append)
        self.chosen = self.current
        self.recorded, self.looks = None, 0
        copy_, empty = torch.Tensor.copy_, torch.empty

        def copying(tensor, source, non_blocking=False):
            if not non_blocking:
                return copy_(tensor, source)
            self.queued.append((self.chosen, lambda: copy_(tensor, source)))

        def allocating(*args, device=None, **kwargs):
            if device is not None and full:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return empty(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "copy_", copying)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: self.held.append(s))
        monkeypatch.setattr(torch, "empty", allocating)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.choosing)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(saving, "_on_gpu", lambda t: t.is_floating_point())
        monkeypatch.setattr(saving, "_host_memory", lambda count, _: empty(count).byte())

    @contextmanager
    def choosing(self, stream):
        self.chosen = stream
        yield
        self.chosen = self.current

    def record(self, stream):
        self.recorded = stream

    def query(self):
        assert threading.current_thread() is not threading.main_thread()
        self.looks += 1
        if self.looks % 3:
            return False
        for stream, copy in self.queued:
            assert stream is self.recorded  # or the event would not wait for it
            copy()
        self.queued.clear()
        return True


def test_from_a_gpu_the_copy_is_taken_in_the_order_of_the_steps(run, saver, disk, monkeypatch):
    cuda, parts = LateCopies(monkeypatch), tensors()
    for images in (1000, 2000):
        disk.open.clear()
        expected = snapshot(parts)
        saver.begin(images, parts, META)
        spoil(parts)
        disk.open.set()
        saver.finish()
        assert_holds(place(run, images), expected)
    assert cuda.waits == [cuda.current] * 2  # the side stream, for the copy on the device
    assert cuda.held == [cuda.side] * 2 and cuda.recorded is cuda.side


def test_a_full_gpu_copies_without_memory_of_its_own(run, saver, monkeypatch):
    parts = tensors()
    cuda = LateCopies(monkeypatch, full=True)
    saver.begin(1000, parts, META)
    saver.finish()
    assert_holds(place(run, 1000), parts)
    assert cuda.recorded is cuda.current and not cuda.held


@pytest.mark.gpu
def test_begin_does_not_wait_for_the_gpu_and_takes_no_memory_for_long(run, saver):
    parts = tensors("cuda")
    parts["model"]["g.large"] = torch.randn(1 << 24, device="cuda")
    saver.begin(1000, parts, META)  # pins its memory
    saver.finish()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    expected = snapshot(parts)
    torch.cuda._sleep(1_000_000_000)  # about half a second, with steps behind it
    saver.begin(2000, parts, META)
    busy = torch.cuda.Event()
    busy.record()
    assert not busy.query()
    spoil(parts)
    saver.finish()
    assert_holds(place(run, 2000), expected)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
