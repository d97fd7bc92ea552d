"""The real loop, by the command line: what a user gets of the step's speed.

pytest benchmarks --benchmark-only -k train
"""

from __future__ import annotations

import json
import statistics
import time

import harness
import pytest
import torch
from contenders import Case, OfState, check

from fastgan.cli import main
from fastgan.config import TrainConfig
from fastgan.data.prepare import prepare
from fastgan.modes import pick_modes
from fastgan.state import State
from fastgan_kernels import gather_u8

GPU = torch.cuda.is_available()
SHAPES = {"64 px, batch 128": {"data": "faces:20000", "size": 64, "batch": 128}}
SHAPES |= {"64 px, batch 1024": {"data": "faces:20000", "size": 64, "batch": 1024}}
if not GPU:
    SHAPES = {"32 px, batch 8": {"data": "faces:64", "size": 32, "batch": 8, "width": 8}}
WAYS = {"--amp --compile": {"amp": True, "compile": True}, "--amp": {"amp": True}}
if not GPU:
    WAYS = {"": {}}
KIMG = 1500 if GPU else 1


@pytest.mark.usefixtures("compile_anew")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.replace(" px, batch ", "px-b"))
def test_train(shape, way, device, record_rows, benchmark, tmp_path):
    """Images a second: of the loop between its grids and checkpoints, of the whole command, and of
    the step alone.
    """
    options = SHAPES[shape] | WAYS[way]
    config = TrainConfig(**options, kimg=KIMG)
    cache = prepare(config.data, config)
    flags = [f"--data={cache.path}", f"--kimg={KIMG}", f"--out={tmp_path}"]
    flags += [f"--{k}={v}" for k, v in options.items() if k in ("size", "batch", "width")]

    state = State(config, cache, pick_modes(config))
    state.warm_up()
    batch = state.feed.next()
    case = Case(config.size, config.batch, config.latent, config.width)
    real = gather_u8(*batch, dtype=torch.float32, impl="ref")
    error = check(OfState(state, batch), case, real)

    def alone() -> float:
        """Milliseconds of the run's own step, on one batch."""
        return harness.interleaved_steps({"": lambda: state.advance(batch)}, device)[""].ms

    before = alone()
    begin = time.perf_counter()
    code = benchmark.pedantic(main, args=(["train", *flags, *way.split()],), rounds=1)
    seconds = time.perf_counter() - begin
    assert code == 0
    (run,) = tmp_path.glob("0*")
    ms = statistics.mean([before, alone()])
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    rate = statistics.median(tick["img_per_s"] for tick in ticks[len(ticks) // 4 :])
    step = 1000 * config.batch / ms
    record_rows(
        "train",
        [
            {
                "case": shape,
                "variant": f"fastgan train {way}".strip(),
                "img_per_s": rate,
                "step_img_per_s": step,
                "share_of_step": rate / step,
                "command_img_per_s": 1000 * ticks[-1]["kimg"] / seconds,
                "error": error,
            }
        ],
    )
    benchmark.extra_info["img_per_s"] = rate
