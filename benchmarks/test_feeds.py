"""From a cache, or from files, into the step: the time to the first batch, and what each feed
leaves of the step's speed.

    pytest benchmarks --benchmark-only -k feeds
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contenders import Case, OfState, check
from harness import stretch_ms
from own_process import in_own_process
from pictures import check_squares, drawn, framed_ref, jpeg_faces, repeated

from fastgan.config import DataOptions, TrainConfig
from fastgan.data.feed import Sampler
from fastgan.data.loader import open_data
from fastgan.data.on_the_fly import OnTheFly
from fastgan.data.pool import AHEAD
from fastgan.data.prepare import prepare
from fastgan.data.stream import SLOTS
from fastgan.env import cores
from fastgan.modes import pick_modes
from fastgan.state import State
from fastgan_kernels import gather_u8

GPU = torch.cuda.is_available()
FFHQ_IMAGES, FFHQ_FOLDER = 70_000, 1000
EDGE = 64 if GPU else 32  # of the square, and of its file, which nothing then changes
GOAL_MS = 1000  # to the first batch, when all is imported
ROUNDS = 3
SHAPE: dict[str, Any] = {"size": 64, "batch": 128, "amp": True, "compile": True}
IMAGES = 20_000 if GPU else 1000
if not GPU:  # a step so small that the feed matters
    SHAPE = {"size": 64, "batch": 64, "width": 8}
FEEDS = ("resident", "stream", "dali")
ALONE = "the step alone"
CHECKED = 2  # batches
# batches, untimed, that use up what a feed made ahead while others ran: in the workers, in the
# thread's hand and in its buffers
LEAD = AHEAD * cores() + 1 + SLOTS


def test_feeds_first_batch(scale, record_rows, benchmark, tmp_path):
    """Of a set as large and in as many folders as FFHQ that is prepared already, in a process that
    has imported torch; and of the process, from its start.
    """
    count, batch = round(FFHQ_IMAGES * min(scale, 1)), 128
    files = drawn(tmp_path / "distinct", "PNG", EDGE)
    source, out = tmp_path / "images", tmp_path / "cache"
    repeated(files, source, count, max(1, round(FFHQ_FOLDER * min(scale, 1))))
    prepare(str(source), DataOptions(size=EDGE), out=out)
    distinct = np.stack([framed_ref(file, EDGE) for file in files])
    ways = {"fastgan, prepared": "fastgan", "ImageFolder, DataLoader, v2": "torchvision"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}

    def measure() -> None:
        for name, way in ways.items():
            begin = time.perf_counter()
            row = in_own_process(way, source, out, EDGE, batch)
            row["process_ms"] = 1000 * (row.pop("ready_at") - begin)
            got = torch.load(out.with_suffix(".batch"))
            pixels, rows = got["pixels"].numpy(), got["rows"]
            if rows is None:  # in an order that nobody knows
                apart = pixels[:, None].astype(int) - distinct
                places = np.abs(apart).mean((2, 3, 4)).argmin(1)
            else:
                places = rows.numpy() % len(files)
            assert row["images"] == count and len(pixels) == batch
            assert len(set(places.tolist())) == len(files)
            row["error"] = check_squares(name, pixels, distinct[places])
            found[name].append(row)

    benchmark.pedantic(measure, rounds=ROUNDS if scale >= 1 else 1)
    rows = [
        {"case": f"{count:,} PNGs, {EDGE} px, batch {batch}", "variant": name}
        | {key: statistics.median(row[key] for row in runs) for key in runs[0]}
        | {"high_ms": max(row["first_batch_ms"] for row in runs)}
        for name, runs in found.items()
    ]
    rows[0]["goal_ms"] = GOAL_MS
    record_rows("first_batch", rows)


@pytest.mark.usefixtures("compile_anew")
def test_feeds(scale, device, record_rows, benchmark, tmp_path):
    """Images a second: of the step on one batch, of the loop with each feed, and of the feed when
    no step takes its time.
    """
    batch, count = SHAPE["batch"], max(3 * SHAPE["batch"], round(IMAGES * scale))
    files, kind = jpeg_faces(tmp_path / "distinct", count)
    files = repeated(files, tmp_path / "images", count)
    common = {**SHAPE, "data": str(tmp_path / "images"), "cache": tmp_path / "caches"}
    with ExitStack() as opened:
        states, decoders = {}, {}
        for loader in FEEDS:
            config = TrainConfig(**common, loader=loader)
            data = opened.enter_context(closing(open_data(config)))
            state = State(config, data, pick_modes(config))
            states[loader] = opened.enter_context(closing(state))
            decoders[loader] = data.decoder if isinstance(data, OnTheFly) else data.meta.decoder
        errors = {name: _feed_error(name, state, files) for name, state in states.items()}
        for state in states.values():
            state.warm_up()
        resident = states["resident"]
        same = resident.feed.next()
        case = Case(config.size, batch, config.latent, config.width)
        real = gather_u8(*same, dtype=torch.float32, impl="ref")
        errors[ALONE] = check(OfState(resident, same), case, real)

        calls = {ALONE: lambda: resident.advance(same)}
        for name, state in states.items():
            calls[name] = lambda t=state: t.advance(t.feed.next())
            calls[f"{name} feed"] = state.feed.next
        how = (0.5, ROUNDS) if scale >= 1 else (0.05, 1)
        seconds = benchmark.pedantic(_stretches, args=(calls, device, *how), rounds=1)
    rates = {name: [batch / s for s in found] for name, found in seconds.items()}
    rows = []
    for name in (ALONE, *FEEDS):
        of_step = [a / b for a, b in zip(rates[name], rates[ALONE], strict=True)]
        alone = rates.get(f"{name} feed")
        row = {
            "case": f"{case}, width {config.width}, JPEG 200 px, {kind}",
            "variant": name if name == ALONE else f"--loader {name}",
            "decoder": decoders.get(name),
            "img_per_s": statistics.median(rates[name]),
            "low_img_per_s": min(rates[name]),
            "high_img_per_s": max(rates[name]),
            "share_of_step": statistics.median(of_step),
            "feed_img_per_s": statistics.median(alone) if alone else None,
            "images": count,
            "cores": cores(),
            "error": errors[name],
        }
        rows.append(row)
    record_rows("feeds", rows)


def _feed_error(name: str, state: State, files: list[Path]) -> float:
    """The mean error of a feed's first batches against the files whose turn it is, in levels."""
    config, errors = state.config, []
    turn = Sampler(len(files), config.batch, config.seed)
    for _ in range(CHECKED):
        images, index = state.feed.next()
        expected = np.stack([framed_ref(files[row], config.size) for row in turn.next()])
        errors.append(check_squares(name, images[index].cpu().numpy(), expected))
    return statistics.mean(errors)


def _stretches(
    calls: dict[str, Callable[[], Any]], device: torch.device, stretch_s: float, rounds: int
) -> dict[str, list[float]]:
    """Seconds a call, of stretches of about `stretch_s`, each behind a lead; in turn."""

    def stretch(call: Callable[[], Any], count: int) -> float:
        stretch_ms(call, LEAD, device)
        return stretch_ms(call, count, device) / 1000

    counts = {name: max(1, round(stretch_s / stretch(call, 8))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(stretch(call, counts[name]))
    return found
