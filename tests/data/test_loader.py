"""Which feed a set gets, and why."""

import numpy as np
import pytest
import torch

from fastgan.config import TrainConfig
from fastgan.data.feed import ResidentFeed
from fastgan.data.loader import open_data, open_feed
from fastgan.data.stream import StreamFeed


@pytest.fixture
def cache(tmp_path):
    return open_data(TrainConfig(data="faces:40", size=32, cache=tmp_path))


@pytest.mark.parametrize(
    ("loader", "kind"), [("auto", ResidentFeed), ("resident", ResidentFeed), ("stream", StreamFeed)]
)
def test_on_a_cpu_the_map_itself_is_read_unless_asked_otherwise(loader, kind, cache):
    config = TrainConfig(size=32, batch=8, loader=loader)
    feed, line = open_feed(cache, config, torch.device("cpu"))
    assert type(feed) is kind and "40 x 32 x 32 x 3 bytes = 0.00 GB" in line
    feed.close()


@pytest.mark.parametrize(("free_bytes", "kind"), [(200_000, "resident"), (180_000, "stream")])
def test_a_gpu_holds_what_takes_two_thirds_of_it(free_bytes, kind, cache, monkeypatch):
    """40 x 32 x 32 x 3 bytes are 122,880."""
    made = []

    def feed(name):
        return lambda *args: made.append(name)

    monkeypatch.setattr("fastgan.data.loader.ResidentFeed", feed("resident"))
    monkeypatch.setattr("fastgan.data.loader.StreamFeed", feed("stream"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free_bytes, 10**9))
    _, line = open_feed(cache, TrainConfig(size=32), torch.device("cuda"))
    assert made == [kind] and ("more than 67% of it" in line) == (kind == "stream")
    open_feed(cache, TrainConfig(size=32, loader="resident"), torch.device("cuda"))
    assert made[1] == "resident"


def test_ranks_read_the_shares_of_one(cache):
    config = TrainConfig(size=32, batch=8, loader="stream")
    ranks = [open_feed(cache, config, torch.device("cpu"), rank, 2)[0] for rank in range(2)]
    alone, _ = open_feed(cache, config, torch.device("cpu"))
    for _ in range(7):
        shares = [feed.next() for feed in ranks]
        together = np.concatenate([batch.images[batch.index].numpy() for batch in shares])
        batch = alone.next()
        assert np.array_equal(together, batch.images[batch.index].numpy())
    for feed in (*ranks, alone):
        feed.close()
