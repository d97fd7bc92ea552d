"""What checkpoints cost a run: how long the loop waits for one, how long it is written beside the
steps and slows them, and which share of the run that is at the interval that --save-kimg has
unless it is given.

    pytest benchmarks --benchmark-only -k saving
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from contenders import Case, OfState, check
from harness import stretch_ms

from fastgan import checkpoint
from fastgan.config import DEFAULT_KIMG, TrainConfig
from fastgan.data.loader import open_data
from fastgan.modes import pick_modes
from fastgan.saving import Saver
from fastgan.state import State
from fastgan.trainer import SAVE_SHARE
from fastgan_kernels import gather_u8

GPU = torch.cuda.is_available()
SHAPE: dict[str, Any] = {"size": 64, "batch": 128, "width": 64, "data": "faces:1000"}
TRIED: dict[str, Any] = {"size": 32, "batch": 8, "width": 8, "data": "faces:50"}
WAYS = {"fp32": {}, "--amp --compile": {"amp": True, "compile": True}} if GPU else {"fp32": {}}
GOAL_SHARE = 0.01  # of the run
KEEP = 2
ROUNDS = 9 if GPU else 3
COVER = 2.0  # a stretch of steps is so many times as long as a checkpoint is written


@pytest.mark.usefixtures("compile_anew")
@pytest.mark.parametrize("way", WAYS)
def test_saving(way, scale, device, record_rows, benchmark, tmp_path, monkeypatch):
    """Stretches of steps without a checkpoint, with one that begins before the first step and is
    written in the saver's thread, and with one that the loop writes itself; in turn.
    """
    config = TrainConfig(**(SHAPE if scale >= 1 else TRIED), **WAYS[way], cache=tmp_path / "cache")
    case = Case(config.size, config.batch, config.latent, config.width)
    written: list[float] = []
    monkeypatch.setattr(checkpoint, "save", _timed(checkpoint.save, written))
    with ExitStack() as opened:
        data = opened.enter_context(closing(open_data(config)))
        state = opened.enter_context(closing(State(config, data, pick_modes(config))))
        state.warm_up()
        batch = state.feed.next()
        real = gather_u8(*batch, dtype=torch.float32, impl="ref")
        error = check(OfState(state, batch), case, real)
        runs = Runs(state, tmp_path)
        saver = opened.enter_context(closing(Saver(tmp_path / "thread", KEEP)))
        first_ms = 1000 * runs.begin(saver)
        saver.finish()
        size = runs.check_newest(tmp_path / "thread")
        step_s = stretch_ms(lambda: runs.steps(1), 2, device) / 1000
        steps = math.ceil(COVER * written[-1] / step_s) + 1

        def measure() -> list[dict[str, float]]:
            return [_round(runs, saver, steps, written) for _ in range(ROUNDS if scale >= 1 else 1)]

        rounds = benchmark.pedantic(measure, rounds=1)
        runs.check_newest(tmp_path / "thread")
        runs.check_newest(tmp_path / "loop")

    def median(key: str) -> float:
        return statistics.median(found[key] for found in rounds)

    interval_s = SAVE_SHARE * DEFAULT_KIMG * 1000 / config.batch * median("plain_s") / steps
    rows = []
    for where, name in (("thread", "in a thread (fastgan)"), ("loop", "in the loop")):
        cost = [found[f"{where}_s"] - found["plain_s"] for found in rounds]
        row = {
            "case": f"{case}, width {config.width}, {way}",
            "variant": name,
            "checkpoint_mb": size / 1e6,
            "waits_ms": 1000 * median(f"{where}_waits_s"),
            "high_waits_ms": 1000 * max(found[f"{where}_waits_s"] for found in rounds),
            "first_ms": first_ms if where == "thread" else None,
            "write_ms": 1000 * median(f"{where}_write_s"),
            "cost_ms": 1000 * statistics.median(cost),
            "interval_s": interval_s,
            "share_waiting": median(f"{where}_waits_s") / interval_s,
            "share_of_run": statistics.median(cost) / interval_s,
            "goal_share": GOAL_SHARE if where == "thread" else None,
            "error": error,
        }
        rows.append(row)
    record_rows("saving", rows)
    ours = rows[0]
    assert scale < 1 or max(ours["share_waiting"], ours["share_of_run"]) < GOAL_SHARE


def _timed(save: Callable[..., Path], seconds: list[float]) -> Callable[..., Path]:
    def timed(*args: Any) -> Path:
        begin = time.perf_counter()
        path = save(*args)
        seconds.append(time.perf_counter() - begin)
        return path

    return timed


class Runs:
    """A state, and the run folders that its checkpoints go into."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder
        for name in ("thread", "loop"):
            (folder / name / "checkpoints").mkdir(parents=True)

    def begin(self, saver: Saver) -> float:
        """Begin a checkpoint; seconds that the loop waits for that."""
        begin = time.perf_counter()
        saver.begin(self.state.images, self.state.parts(), self.state.meta())
        return time.perf_counter() - begin

    def write(self) -> float:
        """Write a checkpoint while the loop waits; seconds."""
        run, state = self.folder / "loop", self.state
        begin = time.perf_counter()
        checkpoint.save(run / "checkpoints", state.images, state.parts(), state.meta())
        checkpoint.prune(run, KEEP)
        return time.perf_counter() - begin

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.state.take(self.state.feed.next())
        if GPU:
            torch.cuda.synchronize()

    def check_newest(self, run: Path) -> int:
        """The bytes of the newest checkpoint, which is the state as it is now."""
        found = checkpoint.newest(run)
        for part, tensors in self.state.parts().items():
            read = found.tensors(part)
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[name], t.cpu()) for name, t in tensors.items())
        return sum(path.stat().st_size for path in found.path.iterdir())


def _round(runs: Runs, saver: Saver, steps: int, written: list[float]) -> dict[str, float]:
    """Seconds of a stretch of each kind, and of the parts of it."""
    found = {}
    runs.steps(1)
    begin = time.perf_counter()
    runs.steps(steps)
    found["plain_s"] = time.perf_counter() - begin

    begin = time.perf_counter()
    found["thread_waits_s"] = runs.begin(saver)
    runs.steps(steps)
    found["thread_s"] = time.perf_counter() - begin
    saver.finish()
    found["thread_write_s"] = written[-1]

    begin = time.perf_counter()
    found["loop_waits_s"] = runs.write()
    runs.steps(steps)
    found["loop_s"] = time.perf_counter() - begin
    found["loop_write_s"] = written[-1]

    # of the same state, to be compared with it
    runs.begin(saver)
    runs.write()
    saver.finish()
    return found
