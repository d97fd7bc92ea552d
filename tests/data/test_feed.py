"""The walk over shuffled epochs: complete, resumable anywhere, the same on every run."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.data import feed
from fastgan.data.feed import ResidentFeed, Sampler
from fastgan.data.stream import StreamFeed, from_map
from fastgan.errors import RunError

counts = st.integers(1, 40)
batches = st.integers(1, 100)
seeds = st.integers(0, 2**64)


@given(counts, batches, seeds, st.integers(1, 12))
def test_every_image_once_an_epoch(count, batch, seed, steps):
    sampler = Sampler(count, batch, seed)
    walked = np.concatenate([sampler.next() for _ in range(steps)])
    assert walked.dtype == np.int64 and len(walked) == steps * batch
    for start in range(0, len(walked) - count + 1, count):
        assert sorted(walked[start : start + count]) == list(range(count))
    rest = walked[len(walked) // count * count :]
    assert len(set(rest)) == len(rest)
    assert sampler.state_dict() == {"epoch": len(walked) // count, "offset": len(walked) % count}


@given(counts, batches, seeds, st.integers(0, 8), st.integers(1, 100))
def test_resumed_anywhere_the_walk_is_the_same(count, batch, seed, steps, other_batch):
    whole = Sampler(count, batch, seed)
    for _ in range(steps):
        whole.next()
    resumed = Sampler(count, batch, seed)
    resumed.load_state_dict(whole.state_dict())
    for _ in range(4):
        assert np.array_equal(resumed.next(), whole.next())
    # the walk does not depend on how it is cut into batches
    recut = Sampler(count, other_batch, seed)
    walked = np.concatenate([recut.next() for _ in range(-(-count * 3 // other_batch))])
    again = Sampler(count, 1, seed)
    assert np.array_equal(walked, np.concatenate([again.next() for _ in walked]))


def test_orders_differ_between_epochs_and_seeds():
    orders = [Sampler(64, 64, seed) for seed in (0, 1)]
    walks = [sampler.next() for sampler in orders for _ in range(3)]
    assert len({walk.tobytes() for walk in walks}) == 6
    expected = np.random.default_rng([1, 2]).permutation(64)
    assert np.array_equal(walks[5], expected)  # documented, so that others can rebuild it


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"epoch": 0}, "offset"),
        ({"epoch": 0, "offset": 10}, "offset must be a whole number, 0 to 9; got 10"),
        ({"epoch": -1, "offset": 0}, "epoch"),
        ({"epoch": 1.0, "offset": 0}, "epoch"),
        ({"epoch": True, "offset": 0}, "epoch"),
        ({"epoch": 0, "offset": 0, "count": 9}, "count"),
    ],
)
def test_impossible_positions_are_refused(state, named):
    sampler = Sampler(10, 4, 0)
    sampler.next()
    with pytest.raises(ValueError, match=named):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"epoch": 0, "offset": 4}


@pytest.mark.parametrize(("count", "batch", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_walks_are_refused(count, batch, seed):
    with pytest.raises(ValueError, match="must be"):
        Sampler(count, batch, seed)


def numbered(count, size=2):
    images = np.zeros((count, size, size, 3), np.uint8)
    images[:] = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return images


def resident_feed(images, batch, seed, device="cpu"):
    return ResidentFeed(images, Sampler(len(images), batch, seed), torch.device(device))


def streamed_feed(images, batch, seed, device="cpu"):
    sampler = Sampler(len(images), batch, seed)
    return StreamFeed(from_map(images), images.shape[1], sampler, torch.device(device))


def pixels(batch):
    """What the step gathers, by one pixel of each image."""
    return batch.images[batch.index][:, 0, 0, 0].tolist()


@settings(deadline=None, max_examples=40)
@given(counts, batches, st.integers(0, 6), st.integers(1, 4))
def test_streamed_batches_are_the_resident_ones(count, batch, skipped, steps):
    images = numbered(count)
    resident, streamed = (make(images, batch, 7) for make in (resident_feed, streamed_feed))
    resumed = streamed_feed(images, batch, 7)
    resumed.next()  # a walk of its own, which it leaves
    for _ in range(skipped):
        assert pixels(streamed.next()) == pixels(resident.next())
    resumed.load_state_dict(streamed.state_dict())
    for _ in range(steps):
        expected = pixels(resident.next())
        for source in (streamed, resumed):
            assert pixels(source.next()) == expected
            assert source.state_dict() == resident.state_dict() and source.epoch == resident.epoch
            assert source.images.shape == (2 * batch, 2, 2, 3)
    for source in (streamed, resumed):
        source.close()


def test_a_batch_stays_until_the_next_is_asked_for():
    images, threads = numbered(200), threading.active_count()
    streamed, sampler = streamed_feed(images, 4, 3), Sampler(200, 4, 3)
    for _ in range(60):
        batch, expected = streamed.next(), sampler.next() % 256
        for _ in range(3):
            assert pixels(batch) == expected.tolist()
            time.sleep(0.001)  # for the thread to do what it must not
    streamed.close()
    assert threading.active_count() == threads


@pytest.mark.timeout(60)
def test_closing_does_not_wait_for_what_hangs():
    ended = threading.Event()

    def fetch(numbers):
        yield np.zeros((4, 2, 2, 3), np.uint8)
        assert ended.wait(60)
        raise RuntimeError("interrupted")

    sampler = Sampler(9, 4, 0)
    streamed = StreamFeed(fetch, 2, sampler, torch.device("cpu"), ended.set)
    streamed.next()
    began = time.monotonic()
    streamed.close()
    assert time.monotonic() - began < 10


def test_the_thread_enters_its_gpu_before_it_sends():
    """A new thread is on the first GPU, whichever the run has."""
    done, ready = [], threading.Event()

    class Upload:
        def enter(self):
            done.append(("enter", threading.current_thread().name))

        def send(self, slot, pixels):
            done.append(("send", threading.current_thread().name))
            ready.set()

        def wait(self, slot): ...
        def read(self, slot): ...
        def finish(self): ...

    images = np.zeros((9, 2, 2, 3), np.uint8)
    streamed = StreamFeed(from_map(images), 2, Sampler(9, 4, 0), torch.device("cpu"))
    streamed._upload = Upload()
    streamed.next()
    assert ready.wait(10)
    streamed.close()
    assert done[:2] == [("enter", "fastgan feed"), ("send", "fastgan feed")]
    assert [what for what, _ in done].count("enter") == 1


def test_what_fails_in_the_thread_is_raised_at_the_step():
    def fetch(numbers):
        yield np.zeros((4, 2, 2, 3), np.uint8)
        raise OSError("the disk is gone")

    threads = threading.active_count()
    streamed = StreamFeed(fetch, 2, Sampler(9, 4, 0), torch.device("cpu"))
    streamed.next()
    with pytest.raises(OSError, match="the disk is gone"):
        streamed.next()
    streamed.close()
    assert threading.active_count() == threads


@settings(deadline=None)
@given(counts, st.integers(1, 5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 9))
def test_ranks_share_the_batches_of_one(count, share, world, steps):
    alone = Sampler(count, share * world, 5)
    ranks = [Sampler(count, share * world, 5, rank, world) for rank in range(world)]
    for _ in range(steps):
        assert np.array_equal(np.concatenate([rank.next() for rank in ranks]), alone.next())
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    regrouped = Sampler(count, share * world, 5)  # as one rank, from where they are
    regrouped.load_state_dict(ranks[-1].state_dict())
    assert np.array_equal(regrouped.next(), alone.next())


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_impossible_ranks_are_refused(rank, world):
    with pytest.raises(ValueError, match="Sampler: (batch must be a multiple of world|world must)"):
        Sampler(100, 8, 0, rank, world)


@settings(deadline=None)
@given(counts, batches, st.integers(0, 6), st.integers(1, 4))
def test_resident_batches_are_the_sampler_s(count, batch, skipped, steps):
    sampler = Sampler(count, batch, 7)
    resident = resident_feed(numbered(count), batch, 7)
    for _ in range(skipped):
        sampler.next()
        resident.next()
    resumed = resident_feed(numbered(count), batch, 7)
    resumed.load_state_dict(resident.state_dict())
    for _ in range(steps):
        expected = sampler.next()
        for source in (resident, resumed):
            images, index = source.next()
            assert index.dtype == torch.int64 and np.array_equal(index.numpy(), expected)
            assert np.array_equal(images[index][:, 0, 0, 0].numpy(), expected.astype(np.uint8))
            assert source.epoch == sampler.epoch
            assert source.state_dict() == sampler.state_dict()


def test_the_map_itself_is_resident_on_a_cpu(tmp_path):
    np.save(tmp_path / "images.npy", numbered(5))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = resident_feed(mapped, 2, 0).next().images
    assert images.data_ptr() == mapped.ctypes.data
    assert torch.equal(images, torch.from_numpy(numbered(5)))


def test_a_set_too_large_for_the_gpu_is_refused_with_the_arithmetic(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_500_000_000, 80_000_000_000))
    images = np.broadcast_to(np.zeros((), np.uint8), (1_000_000, 64, 64, 3))
    with pytest.raises(RunError) as caught:
        feed._resident(images, torch.device("cuda"))
    message = str(caught.value)
    assert "1,000,000 images x 64 x 64 x 3 bytes = 12.3 GB" in message
    assert "2.5 of 80.0 GB are free" in message and "--loader stream" in message


@pytest.mark.gpu
def test_streamed_batches_on_a_gpu():
    images = np.random.default_rng(0).integers(0, 256, (5000, 64, 64, 3), np.uint8)
    streamed, sampler = streamed_feed(images, 256, 3, "cuda"), Sampler(5000, 256, 3)
    work = torch.randn(2048, 2048, device="cuda")
    for _ in range(100):
        batch, expected = streamed.next(), images[sampler.next()]
        for _ in range(5):
            work = (work @ work).clamp(-1, 1)  # the step is behind the copies
        got = batch.images[batch.index]  # queued after it, read when the next copies are under way
        following = streamed.next()
        assert np.array_equal(got.cpu().numpy(), expected)
        assert np.array_equal(
            following.images[following.index].cpu().numpy(), images[sampler.next()]
        )
    streamed.close()


@pytest.mark.gpu
def test_the_set_is_uploaded_whole_in_pieces(monkeypatch):
    monkeypatch.setattr(feed, "UPLOAD_BYTES", 100)  # 8 images of 12 bytes at a time
    resident = resident_feed(numbered(50), 16, 3, "cuda")
    sampler = Sampler(50, 16, 3)
    for _ in range(10):
        images, index = resident.next()
        assert images.is_cuda and index.is_cuda
        expected = sampler.next()
        assert np.array_equal(index.cpu().numpy(), expected)
        assert np.array_equal(images[index][:, 0, 0, 0].cpu().numpy(), expected)
