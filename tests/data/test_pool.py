"""Decoding in other processes: the same squares whoever does it, and nothing that a file does
reaches this one.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from odd_files import odd_files, write_odd_files
from test_decode import HERE, both, encode, needs_dali, picture

from fastgan.config import DataOptions
from fastgan.data import pool as pool_module
from fastgan.data import process
from fastgan.data.decode import AUTO, open_decoder
from fastgan.data.image_file import ImageFile
from fastgan.data.images import find_images
from fastgan.data.pool import DecodePool, Interrupted, batches, open_pool
from fastgan.errors import RunError
from fastgan.framing import Framing


def write(folder, blobs):
    files = []
    for i, blob in enumerate(blobs):
        path = folder / f"{i:05d}.png"
        path.write_bytes(blob)
        files.append(ImageFile(path.name, str(path), len(blob), 0))
    return files


def outcomes(pool, files, width=4):
    """For each file its square or its reason."""
    found = []
    for decoded in pool.run(files[at : at + width] for at in range(0, len(files), width)):
        squares = iter(decoded.squares)
        found += [next(squares) if reason is None else reason for reason in decoded.reasons]
        assert next(squares, None) is None
    return found


@both
def test_squares_are_those_of_the_decoder_for_any_number_of_processes(name, tmp_path, monkeypatch):
    blobs = [encode(picture(30 + i % 7, 40 - i % 5, i)) for i in range(40)]
    expected = np.stack(open_decoder(Framing(16), [name], 1)[0].decode(blobs))
    files = write(tmp_path, blobs)
    for count, width in ((1, 40), (2, 3), (5, 7)):
        monkeypatch.setattr(pool_module, "cores", lambda count=count: count)
        with DecodePool(Framing(16), [name]) as pool:
            assert np.array_equal(np.stack(outcomes(pool, files, width)), expected)
            assert sum(worker is not None for worker in pool._workers) == count


@both
def test_a_folder_of_odd_and_broken_files(name, tmp_path, capfd):
    """Of every one the pixels it was made of, or why not; and silence."""
    odd = {file.name: file for file in write_odd_files(tmp_path)}
    files = find_images(tmp_path)
    assert [file.name for file in files] == sorted(odd, key=os.fsencode) and len(odd) > 125
    framing = Framing(32, crop="none")
    with DecodePool(framing, [name]) as pool:
        names = [file.name for file in files]
        found = dict(zip(names, outcomes(pool, files, 64), strict=True))
    sound = open_decoder(framing, ["pillow"], 1)[0]
    wrong = []
    for at, file in odd.items():
        if file.pixels is None:
            fits = isinstance(found[at], str) and found[at].startswith(file.reason)
        else:
            expected = sound.decode_one(encode(file.pixels)).astype(int)
            apart = np.abs(found[at] - expected)[2:-2, 2:-2]
            fits = apart.max() <= file.tolerance + 1
        if not fits:
            wrong.append(f"{at!r}: {found[at]}")
    assert not wrong, "\n".join(wrong)
    assert capfd.readouterr() == ("", "")


@both
def test_two_thousand_damaged_files(name, tmp_path, capfd):
    rng = np.random.default_rng(0)
    whole = [file.blob for file in odd_files() if file.pixels is not None and file.tolerance < 9]
    files = write(tmp_path, [damaged(whole[i % len(whole)], rng) for i in range(2000)])
    with DecodePool(Framing(16), [name]) as pool:
        began = time.monotonic()
        found = outcomes(pool, files, 50)
        seconds = time.monotonic() - began
    refused = [outcome for outcome in found if isinstance(outcome, str)]
    assert len(found) == 2000 and 200 < len(refused) < 1990
    assert all(reason.isprintable() and len(reason) < 200 for reason in refused)
    kinds = Counter(reason.partition(":")[0] for reason in refused)
    assert not kinds["crashes"] + kinds["hangs"] + kinds["fails"], kinds
    assert seconds < 120
    assert capfd.readouterr() == ("", "")


def damaged(blob, rng):
    """The bytes with a few of them changed, cut out, doubled, or the end gone."""
    data = bytearray(blob)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, max(1, len(data))))
        length = int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at : at + 4] = b"\x7f\xff\xff\xff"[: len(data[at : at + 4])]
            case 4:
                del data[at:]
    return bytes(data)


@pytest.fixture
def bad_worker(monkeypatch):
    monkeypatch.setattr(process, "WORKER", "bad_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(pool_module, "cores", lambda: 2)


def test_whoever_harms_the_decoder_is_refused_alone(bad_worker, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pool_module, "BATCH_LIMIT_S", 1.0)
    monkeypatch.setattr(process, "FILE_LIMIT_S", 0.5)
    monkeypatch.setattr(process, "WALL_FACTOR", 3)
    sound = [encode(picture(20, 20, i)) for i in range(30)]
    harm = {3: b"crash", 8: b"spin", 9: b"exit", 17: b"memory", 18: b"print", 23: b"wait"}
    harm |= {27: b"fault", 29: b"crash"}
    files = write(tmp_path, [harm.get(i, blob) for i, blob in enumerate(sound)])
    expected = open_decoder(Framing(16), ["pillow"], 1)[0].decode(sound)
    with DecodePool(Framing(16), ["pillow"]) as pool:
        found = outcomes(pool, files)
    reasons = {i: found[i] for i in harm}
    assert reasons == {
        3: "crashes: its decoder died of SIGSEGV",
        8: "hangs: its decoder was not done after 0.5 s",
        9: "crashes: its decoder died of exit code 3",
        17: "too large: its decoder asks for more memory than it may have",
        18: "not an image",
        23: "hangs: its decoder was not done after 0.5 s",
        27: "fails: ZeroDivisionError: a mistake of ours (bad_worker.py:32)",
        29: "crashes: its decoder died of SIGSEGV",
    }
    assert all(np.array_equal(found[i], expected[i]) for i in range(30) if i not in harm)
    assert capfd.readouterr() == ("", "")


def test_whoever_ends_the_processes_harms_no_file(tmp_path, monkeypatch):
    """As the system does for lack of memory, or a cluster's scheduler: not the fault of a file."""
    blobs = [encode(picture(20, 20, i)) for i in range(40)]
    files = write(tmp_path, blobs)
    expected = open_decoder(Framing(16), ["pillow"], 1)[0].decode(blobs)
    receive = process.DecodeProcess.receive
    left = [3]

    def killed(self):
        if left[0]:
            left[0] -= 1
            self._process.send_signal(signal.SIGTERM)  # they pass that over
            self.kill()
        return receive(self)

    monkeypatch.setattr(process.DecodeProcess, "receive", killed)
    with DecodePool(Framing(16), ["pillow"]) as pool:
        assert np.array_equal(np.stack(outcomes(pool, files)), np.stack(expected))
        assert not left[0]
        pool.one(files[0])
        pool._spares["pillow"].kill()  # while it has nothing to do
        assert np.array_equal(pool.one(files[0]).squares[0], expected[0])
        left[0] = 1000
        with pytest.raises(
            RunError, match="decode 0.*png are ended again and again.*SIG(KILL|TERM)"
        ):
            outcomes(pool, files)


@needs_dali
def test_what_ends_dali_is_tried_with_pillow(bad_worker, tmp_path, monkeypatch):
    good = encode(picture(20, 20))
    files = write(tmp_path, [good, b"crash, but for Pillow" + good])
    with DecodePool(Framing(16), ["dali-cpu"]) as pool:
        first, second = outcomes(pool, files)
        assert pool.by_pillow == 1
    assert np.abs(first.astype(int) - second)[2:-2, 2:-2].max() <= 1


def test_every_process_has_the_same_decoder(monkeypatch, tmp_path):
    files = write(tmp_path, [encode(picture(20, 20, i)) for i in range(20)])
    monkeypatch.setattr(pool_module, "cores", lambda: 2)
    with DecodePool(Framing(16), ["pillow"]) as pool:
        pool._worker(1)._chosen = ("dali-cpu", ["no pillow: a riddle"])
        with pytest.raises(RunError, match="another only with dali-cpu .*--decoder dali-cpu lets"):
            outcomes(pool, files)


def test_an_interrupt_ends_what_is_waited_for(bad_worker, tmp_path):
    files = write(tmp_path, [b"wait"] * 4)
    with DecodePool(Framing(16), ["pillow"]) as pool:
        timer = threading.Timer(0.5, pool.interrupt)
        timer.start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            outcomes(pool, files)
        assert time.monotonic() - began < 10
        files = write(tmp_path, [encode(picture(20, 20))])
        assert outcomes(pool, files)[0].shape == (16, 16, 3)  # it may be used again


@pytest.mark.timeout(60)
def test_an_interrupt_at_once_is_not_lost(bad_worker, tmp_path):
    files = write(tmp_path, [b"wait"] * 4)
    with DecodePool(Framing(16), ["pillow"]) as pool:
        run = pool.run([files])
        pool.interrupt()
        with pytest.raises(Interrupted):
            next(run)
        files = write(tmp_path, [encode(picture(20, 20, i)) for i in range(40)])
        asked = []
        send = process.DecodeProcess.send
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                process.DecodeProcess,
                "send",
                lambda self, files, limit_s: (asked.append(len(files)), send(self, files, limit_s)),
            )
            outcomes(pool, files, 10)
        assert asked == [10] * 4  # by new processes, and not one by one


def test_signals_for_the_parent_are_passed_over(tmp_path):
    files = write(tmp_path, [encode(picture(20, 20))])
    with DecodePool(Framing(16), ["pillow"]) as pool:
        outcomes(pool, files)
        worker = pool._worker(0)._process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            worker.send_signal(number)
        time.sleep(0.2)
        assert isinstance(outcomes(pool, files)[0], np.ndarray)
        assert pool._worker(0)._process.pid == worker.pid


@pytest.mark.parametrize("fault", ["start crash", "start error"])
def test_what_fails_at_its_start_blames_no_file(fault, bad_worker, tmp_path, monkeypatch):
    files = write(tmp_path, [encode(picture(20, 20))])
    with DecodePool(Framing(16), ["pillow"]) as pool:
        monkeypatch.setenv("BAD_WORKER", fault)
        with pytest.raises(RunError, match="decode 00000.png are ended again and again"):
            pool.one(files[0])


def test_a_process_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(process, "WORKER", "no_such_module")
    with pytest.raises(RunError, match="the process that decodes cannot be started"):
        DecodePool(Framing(16))


def test_a_site_that_prints_at_the_start_of_python(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('welcome')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    files = write(tmp_path, [encode(picture(20, 20))])
    with DecodePool(Framing(16), ["pillow"]) as pool:
        assert outcomes(pool, files)[0].shape == (16, 16, 3)


def test_what_is_left_in_the_middle_disturbs_nothing_later(tmp_path):
    blobs = [encode(picture(20, 20, i)) for i in range(24)]
    files = write(tmp_path, blobs)
    with DecodePool(Framing(16), ["pillow"]) as pool:
        for _ in range(3):
            run = pool.run([file] for file in files)
            next(run)
            run.close()
        expected = open_decoder(Framing(16), ["pillow"], 1)[0].decode(blobs)
        assert np.array_equal(np.stack(outcomes(pool, files)), np.stack(expected))


def test_no_process_outlives_its_parent(tmp_path):
    code = (
        "import time\n"
        "from fastgan.data.pool import DecodePool\n"
        "from fastgan.framing import Framing\n"
        "pool = DecodePool(Framing(16), ['pillow'])\n"
        "print(pool._workers[0]._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in state(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on without its parent")


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_worker_never_imports_torch(tmp_path):
    """Whose import takes seconds and half a gigabyte, in each of them."""
    with DecodePool(Framing(16), HERE[-1:]) as pool:
        outcomes(pool, write(tmp_path, [encode(picture(20, 20))]))
        pid = pool._workers[0]._process.pid
        if not sys.platform.startswith("linux"):
            pytest.skip("no /proc")
        mapped = Path(f"/proc/{pid}/maps").read_text()
        rss_mb = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
    assert "libtorch" not in mapped and rss_mb < 300


def test_batches_are_bounded_in_number_and_bytes(monkeypatch):
    monkeypatch.setattr(pool_module, "BATCH", 3)
    monkeypatch.setattr(pool_module, "BATCH_BYTES", 100)
    sizes = [10, 10, 10, 10, 95, 5, 5, 300, 10]
    files = [ImageFile(str(i), "", size, 0) for i, size in enumerate(sizes)]
    assert [[f.size_bytes for f in batch] for batch in batches(files)] == [
        [10, 10, 10],
        [10],
        [95, 5],
        [5],
        [300],
        [10],
    ]
    assert list(batches([])) == []


def test_the_choice_of_the_decoder(monkeypatch):
    monkeypatch.setattr(pool_module, "driver_cuda", lambda: None)
    with DecodePool(Framing(16)) as pool:
        assert (pool.name, pool.why) == ("pillow", pool_module.NO_GPU)
    with pytest.raises(RunError, match="--decoder dali-gpu: there is no NVIDIA GPU"):
        DecodePool(Framing(16), ["dali-gpu"])


@needs_dali
def test_a_gpu_that_dali_cannot_use_is_passed_over(monkeypatch):
    if pool_module.driver_cuda():
        pytest.skip("it can use this one")
    monkeypatch.setattr(pool_module, "driver_cuda", lambda: (13, 0))
    with DecodePool(Framing(16)) as pool:
        assert pool.name == "pillow" and "it fails on a known JPEG" in pool.why
    with pytest.raises(RunError, match="no dali-gpu: it fails on a known JPEG"):
        DecodePool(Framing(16), ["dali-gpu"])


@pytest.mark.parametrize(
    ("suffix", "count", "tried"),
    [
        ("jpg", 100, ("pillow",)),
        ("png", 100, ("pillow",)),
        ("jpg", 2000, ("dali-gpu", "pillow")),
        ("png", 2000, ("pillow",)),
    ],
)
def test_auto_takes_what_is_fastest_for_the_set(suffix, count, tried, monkeypatch, capsys):
    chosen = []

    class Pool:
        name, why = tried[0], ""

        def __init__(self, framing, decoders, processes, gpu):
            chosen.append(decoders)

    monkeypatch.setattr(pool_module, "DecodePool", Pool)
    monkeypatch.setattr(pool_module, "cores", lambda: 4)
    files = [ImageFile(f"{i}.{suffix}", "", 2 << 20, 0) for i in range(count)]
    open_pool(DataOptions(), files)
    assert capsys.readouterr().out == f"decoding with {tried[0]}\n"
    open_pool(DataOptions(decoder="dali-cpu"), files)
    open_pool(DataOptions(), files, again=True)
    assert chosen == [tried, ("dali-cpu",), AUTO if suffix == "jpg" else AUTO[-1:]]


@pytest.mark.parametrize(
    ("decoders", "gpu", "visible", "seen"),
    [
        (["pillow"], 3, None, ""),
        (["dali-cpu"], None, "0,1", ""),
        (["dali-gpu", "pillow"], None, None, None),
        (["dali-gpu", "pillow"], None, "1", "1"),
        (["dali-gpu", "pillow"], 3, None, "3"),
        (["dali-gpu"], 3, "4,5,6,7", "7"),
        (["dali-gpu"], 0, "MIG-a,MIG-b", "MIG-a"),
    ],
)
def test_a_process_sees_its_own_card_or_none(decoders, gpu, visible, seen, monkeypatch):
    """DALI decodes on the first card that it sees, and takes memory there even on the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environments, start = [], subprocess.Popen

    def noted(*args, env, **options):
        environments.append(env)
        return start(*args, env=env | {"CUDA_VISIBLE_DEVICES": ""}, **options)

    monkeypatch.setattr(process.subprocess, "Popen", noted)
    process.DecodeProcess(Framing(16), decoders, 1, gpu).end()
    assert environments[0].get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize("among", [1, 8, 64])
def test_decoders_on_a_gpu_share_the_cores_and_know_their_card(among, monkeypatch):
    started = []

    class Process:
        def __init__(self, framing, decoders, threads, gpu):
            started.append((threads, gpu))

        def chosen(self):
            return "dali-gpu", []

        def end(self):
            pass

    monkeypatch.setattr(pool_module, "DecodeProcess", Process)
    monkeypatch.setattr(pool_module, "cores", lambda: 64)
    monkeypatch.setattr(pool_module, "driver_cuda", lambda: "13.0")
    files = [ImageFile(f"{i}.jpg", "", 2 << 20, 0) for i in range(2000)]
    open_pool(DataOptions(), files, again=True, among=among, gpu=5).close()
    assert {gpu for _, gpu in started} == {5}
    assert sum(threads for threads, _ in started) == max(2, 64 // among)
