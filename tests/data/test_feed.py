"""The walk over shuffled epochs: complete, resumable anywhere, the same on every run."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.data import feed
from fastgan.data.feed import ResidentFeed, Sampler
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


@settings(deadline=None)
@given(counts, batches, st.integers(0, 6), st.integers(1, 4))
def test_resident_batches_are_the_sampler_s(count, batch, skipped, steps):
    sampler = Sampler(count, batch, 7)
    resident = ResidentFeed(numbered(count), batch, 7, "cpu")
    for _ in range(skipped):
        sampler.next()
        resident.next()
    resumed = ResidentFeed(numbered(count), batch, 7, "cpu")
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
        images = ResidentFeed(mapped, 2, 0, torch.device("cpu")).next().images
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
    assert "2.5 of 80.0 GB are free" in message and "--size" in message


@pytest.mark.gpu
def test_the_set_is_uploaded_whole_in_pieces(monkeypatch):
    monkeypatch.setattr(feed, "UPLOAD_BYTES", 100)  # 8 images of 12 bytes at a time
    resident = ResidentFeed(numbered(50), 16, 3, "cuda")
    sampler = Sampler(50, 16, 3)
    for _ in range(10):
        images, index = resident.next()
        assert images.is_cuda and index.is_cuda
        expected = sampler.next()
        assert np.array_equal(index.cpu().numpy(), expected)
        assert np.array_equal(images[index][:, 0, 0, 0].cpu().numpy(), expected)
