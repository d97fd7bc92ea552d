"""Which feed a set gets (`--loader`): resident where it fits, else streamed, or on the fly."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from .cache import Cache
from .feed import Feed, ResidentFeed, Sampler
from .on_the_fly import OnTheFly
from .prepare import prepare
from .stream import StreamFeed, from_map

RESIDENT_SHARE = 2 / 3  # of the memory that is free: networks and activations need the rest

Data = Cache | OnTheFly


def open_data(config: TrainConfig, among: int = 1, gpu: int | None = None) -> Data:
    """The images to train on, decoded already or to be decoded on the fly; in one of so many
    processes of this machine (`among`), on the card of this number.
    """
    if config.loader == "dali":
        return OnTheFly(config.data, config, among=among, gpu=gpu)
    return prepare(config.data, config, root=config.cache)


def open_feed(
    data: Data, config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1
) -> tuple[Feed, str]:
    """The feed of these images, and in words which one and why."""
    sampler = Sampler(data.count, config.batch, config.seed, rank, world)
    if isinstance(data, OnTheFly):
        feed = StreamFeed(data.fetch, data.size, sampler, device, data.interrupt)
        return feed, f"each batch is decoded on the fly by {data.decoder}"
    size = data.meta.size
    sum_ = f"{data.count:,} x {size} x {size} x 3 bytes = {data.images.nbytes / 1e9:,.2f} GB"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = data.images.nbytes <= RESIDENT_SHARE * free
        sum_ += f"; {free / 1e9:,.1f} GB are free"
    else:
        fits = True  # it is the map itself
    if config.loader == "resident" or (config.loader == "auto" and fits):
        where = "on the GPU" if device.type == "cuda" else "as a memory map"
        return ResidentFeed(data.images, sampler, device), f"the set is resident {where}: {sum_}"
    why = "" if config.loader == "stream" else f", more than {RESIDENT_SHARE:.0%} of it"
    feed = StreamFeed(from_map(data.images), size, sampler, device)
    return feed, f"the set is streamed from its memory map: {sum_}{why}"
