"""The loop: feed -> step -> statistics; log, sample, save, stop, resume. No tensor arithmetic here.

Of several processes each goes through the same loop at the same steps; rank 0 writes and speaks.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, compiling, console
from .config import TrainConfig, flag_of, to_plain
from .data.loader import open_data
from .data.prepare import default_root
from .distributed import Ranks, Stop
from .env import memory_line
from .errors import RunError, UsageError, first_line, is_out_of_memory
from .evaluations import Evaluations, check_images, check_metrics, evaluated
from .health import explain
from .loggers import check_logger
from .modes import Modes, pick_modes
from .paths import absolute, check_folder
from .recorder import Recorder
from .resume import SET, allowed_changes, check_changes, run_of, run_to_resume
from .runlog import Run
from .signals import noted
from .state import State
from .warm_start import FirstWeights, first_weights, warm_start

# What may differ between the processes of a run: where things lie, and what rank 0 alone does.
OWN = {"data", "out", "cache", "loader", "decoder", "on_bad", "keep_checkpoints"}
# Where an interval is not given it is this share of the run.
TICK_SHARE, SAMPLE_SHARE, SAVE_SHARE = 1 / 100, 1 / 20, 1 / 4


def train(
    config: TrainConfig,
    resume: str | None = None,
    *,
    allow_change: Collection[str] = (),
    elastic: bool = False,
    exit_zero: bool = False,
    began: Callable[[Path], object] | None = None,
) -> int:
    """`fastgan train`: returns 0, or 128 + the signal that ended the run after a save.

    Args:
        resume: "auto", a run folder, or a checkpoint in one.
        allow_change: options that may differ from the run's though they are part of what it is.
        elastic: the number of processes may differ from the run's.
        exit_zero: return 0 after SIGTERM and SIGUSR1, too.
        began: is told the run's folder, once there is one.
    """
    paths: dict[str, Any] = {"data": absolute(config.data, "--data")}
    for key in ("init_g", "init_d"):
        if (path := getattr(config, key)) is not None:
            paths[key] = Path(absolute(str(path), flag_of(key)))
    config = config.model_copy(update=paths)
    ranks = Ranks.from_environment()
    _check_share(config, ranks)
    console.speak_as(ranks.rank)
    ranks.take_device(config.device)
    modes = pick_modes(config)  # refused before anything is decoded
    check_logger(config.logger)
    ranks.join(modes.device.type == "cuda")
    failed = True
    try:
        with ExitStack() as stack:  # signals stay noted until all is closed
            allowed = allowed_changes(allow_change)
            code = _train(config, modes, ranks, resume, allowed, elastic, stack, began)
            ranks.leave(failed=False)
        failed = False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory at --batch {config.batch}, --size {config.size}, --width "
            f"{config.width}, --latent {config.latent}, {memory_line(modes.device)}: lower one of "
            f"them (a batch of {_fitting(config.batch // 2, ranks)} needs about half)"
            f"{' or add --amp' if not config.amp else ''} ({first_line(error)})"
        ) from None
    finally:
        if failed:
            ranks.leave(failed)
    by_scheduler = code > 128 and signal.Signals(code - 128).name in ("SIGTERM", "SIGUSR1")
    return 0 if exit_zero and by_scheduler else code


def _check_share(config: TrainConfig, ranks: Ranks) -> None:
    share, rest = divmod(config.batch, ranks.world)
    if rest or share < 2:
        raise UsageError(
            f"--batch must be a multiple of the {ranks.world} processes, at least 2 for each: got "
            f"{config.batch} (nearest: {_fitting(config.batch, ranks)})",
            everywhere=True,
        )


def _fitting(batch: int, ranks: Ranks) -> int:
    """The batch nearest to this that the processes can share."""
    return max(2, round(batch / ranks.world)) * ranks.world


def _train(
    config: TrainConfig,
    modes: Modes,
    ranks: Ranks,
    resume: str | None,
    allow_change: Collection[str],
    elastic: bool,
    outer: ExitStack,
    began: Callable[[Path], object] | None,
) -> int:
    found = None
    first: FirstWeights = {}
    _check_alike(config, modes, ranks)
    with ranks.together():
        if ranks.first:
            check_metrics(config)
            found = run_to_resume(config, resume, allow_change)
            if found is None:
                check_folder(config.out, "--out")
                first = first_weights(config)  # before anything is decoded
    start = ranks.share(str(found) if found is not None else None)
    with ExitStack() as stack:
        with ranks.together():
            data = open_data(config, ranks.local_world, modes.device.index)
            stack.enter_context(closing(data))
            check_images(config, data)
        if modes.compile:
            compiling.keep_in((config.cache or default_root()) / "compiled")
        with ranks.together():
            state = stack.enter_context(closing(State(config, data, modes, ranks)))
        state.check_same_data()
        run = saved = None
        changed: list[str] = []
        with ranks.together():
            if ranks.first:
                # the lock before the checkpoint: what is loaded must be the last that was written
                run = Run.create(config) if start is None else Run(run_of(Path(start)))
                stack.enter_context(closing(run))
                if start is not None:
                    saved = checkpoint.find(Path(start))
                    # the newest that looked whole may not have been
                    changed = check_changes(config, saved.path, saved.meta, allow_change)
        path = ranks.share(str(run.path) if run is not None else None)
        if began is not None:
            began(Path(path))
        if start is not None:
            other_images = not set(SET).isdisjoint(allow_change)
            state.load(saved, other_images, elastic)
            if state.step_count >= state.total_steps:
                console.say(
                    f"{run.path if run else start} has its {state.images / 1000:g} kimg: nothing "
                    "to do (a larger --kimg or --epochs goes on)"
                )
                paths = checkpoint.checkpoints(run.path) if run is not None else []
                if run is not None and saved is not None and saved.path == paths[-1]:
                    run.finish(state.step_count, state.images)
                    if config.eval_kimg and not evaluated(saved.path):
                        console.say(
                            f"not evaluated yet: fastgan evaluate {shlex.quote(str(run.path))}"
                        )
                return 0
        else:
            warm_start(state, first)
        recorder = None
        if run is not None:
            recorder = stack.enter_context(closing(Recorder(run, state, saved, changed)))
        return Trainer(state, recorder).run(outer)


def _check_alike(config: TrainConfig, modes: Modes, ranks: Ranks) -> None:
    """`UsageError` unless all ranks were started with the same options, and compute alike."""
    mine = {flag_of(key): value for key, value in to_plain(config).items() if key not in OWN}
    mine |= {"device": modes.device.type, "16-bit type": str(modes.low), "kernels": modes.impl}
    mine |= {"compile": modes.compile, "CUDA graph": modes.graph, "torch": torch.__version__}
    first = ranks.share(mine)
    cards = ranks.gather(ranks.card() if modes.device.type == "cuda" else "")
    with ranks.together():
        if modes.device.type == "cuda" and cards.count(cards[ranks.rank]) > 1:
            raise UsageError(
                f"{cards.count(cards[ranks.rank])} processes have one GPU ({cards[ranks.rank]}): "
                "start one process a GPU (torchrun --nproc-per-node), or add --device cpu"
            )
        for name in {**first, **mine}:
            if first.get(name) != mine.get(name):
                raise UsageError(
                    f"{name} is {mine.get(name, 'not set')} here and {first.get(name, 'not set')} "
                    "on rank 0: all processes of a run need the same options and software"
                )


class Trainer:
    """The loop over a run's state; `recorder` writes what is to be kept of it, on rank 0."""

    def __init__(self, state: State, recorder: Recorder | None) -> None:
        self.config, self.state, self.recorder = state.config, state, recorder
        self.ranks, self.device = state.ranks, state.device
        self.evaluations = Evaluations(state, recorder)
        self.caught: list[int] = []  # signals
        self.seconds = {"sample": 0.0, "save": 0.0, "evaluate": 0.0}  # since the last tick

    def run(self, outer: ExitStack) -> int:
        """Train to the end, or to a signal; the status in run.json says which. Signals are noted
        until `outer` is closed.
        """
        recorder, state = self.recorder, self.state
        try:
            with self.ranks.together():
                if recorder is not None:
                    recorder.begin()
                self.evaluations.begin()
            state.warm_up()  # before signals wait for a step: there is nothing to save yet
            self.caught = outer.enter_context(noted())
            if recorder is not None:
                recorder.first_pictures()
            with compiling.no_recompiles(state.modes.compile):
                stopped = self._loop()
            with self.ranks.together():
                self._finish()
            done = state.step_count >= state.total_steps
            if recorder is not None:
                recorder.end("done" if done else "preempted", stopped)
        except BaseException as error:
            self.ranks.fail()  # before what follows, which may wait for a disk
            if recorder is not None and not recorder.ended:
                recorder.end("failed" if isinstance(error, Exception) else "preempted")
            raise
        return 0 if done else 128 + stopped

    def _loop(self) -> int:
        """Step after step; returns the signal that ended it, or 0 at the run's end."""
        config, state = self.config, self.state
        self.began = self.tick_start = time.perf_counter()
        self.tick_images = state.images
        stop = Stop(self.ranks, self.caught, state.step_count)
        with console.bar("training", state.total_images / 1000, "kimg", state.images / 1000) as bar:
            if self._evaluation_due() and self.evaluations.missing():
                self._evaluate(bar)  # the run had stopped before it, or in its midst
            while self._left():
                if number := stop.by(state.step_count):
                    return number
                self._next()
                bar.update(state.images / 1000, bar.note or "first tick")
                if self._tick_due():
                    row = self._tick()
                    bar.update(state.images / 1000, f"{row['img_per_s']:,.0f} img/s")
                if not self._left():
                    break  # the end has a grid and a checkpoint of its own
                if self._due(config.sample_kimg, SAMPLE_SHARE):
                    self._sample()
                if self._due(config.save_kimg, SAVE_SHARE):
                    self._save()
                if self._evaluation_due():
                    self._evaluate(bar)
        return 0

    def _left(self) -> int:
        return self.state.total_steps - self.state.step_count

    def _next(self) -> None:
        """A step. A batch that the feed cannot give ends the run: with a checkpoint where it is
        rank 0's; the end of another leaves half a step on all.
        """
        state, recorder = self.state, self.recorder
        try:
            batch = state.feed.next()
        except (UsageError, RunError) as error:
            if recorder is None or not state.step_count:
                raise
            if state.undo_frozen():
                raise self._not_finite() from None
            recorder.save_now()
            raise RunError(
                f"{error}; saved at {state.images / 1000:g} kimg: once that is mended, fastgan "
                f"train --resume {shlex.quote(str(recorder.run.path))} goes on"
            ) from None
        state.take(batch)  # what fails in it, a rank that is gone, leaves half a step

    def _tick_due(self) -> bool:
        if self.config.tick_epochs is not None:
            return self._crossed(self.config.tick_epochs * self.state.data.count)
        return self._due(self.config.tick_kimg, TICK_SHARE)

    def _due(self, every_kimg: float | None, share: float) -> bool:
        return self._crossed(every_kimg * 1000 if every_kimg else share * self.state.total_images)

    def _crossed(self, every: float) -> bool:
        """Whether the last step crossed a multiple of so many images."""
        images, batch = self.state.images, self.config.batch
        return images // every != (images - batch) // every

    def _tick(self) -> dict[str, Any]:
        """Read the statistics since the last tick (the one host sync) and log them."""
        state = self.state
        self._check_health()
        means = state.stats.take()
        now = time.perf_counter()
        seconds = {"train": now - self.tick_start - sum(self.seconds.values()), **self.seconds}
        images = state.images - self.tick_images
        row = {
            "step": state.step_count,
            "kimg": state.images / 1000,
            "epoch": state.images / state.data.count,
            **means,
            "img_per_s": images / seconds["train"],
            "s_per_kimg": 1000 * seconds["train"] / images,
            "gpu_memory_bytes": (
                torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            ),
            "skipped_steps": state.skipped,
            "seconds": seconds,
            "elapsed_s": now - self.began,
        }
        if self.recorder is not None:
            self.recorder.tick(row)
        self.tick_start, self.tick_images = now, state.images
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return row

    def _sample(self) -> None:
        with self._timed("sample"):
            if self.recorder is not None:
                self.recorder.sample()

    def _save(self) -> None:
        with self._timed("save"):
            self._check_health()  # what is not finite is never saved
            self.state.check_same_weights()
            if self.recorder is not None:
                self.recorder.save()

    def _evaluation_due(self) -> bool:
        every = self.config.eval_kimg
        return every is not None and self.state.step_count > 0 and self._due(every, 0)

    def _evaluate(self, bar: console.Bar | None = None) -> None:
        with self._timed("evaluate"):
            self._check_health()
            self.state.check_same_weights()
            self.evaluations.evaluate(bar, self.caught)

    def _finish(self) -> None:
        """The last tick, checkpoint and grid, and evaluation."""
        self._check_health()
        self.state.check_same_weights()
        if not self._left() and self.state.images > self.tick_images:
            self._tick()
        if self.recorder is not None:
            self.recorder.save_now()  # before the picture: it is what must not be lost
            self.recorder.sample()
        if self.config.eval_kimg and not self._left():
            self._evaluate()

    def _check_health(self) -> None:
        """End the run if a step since the last look was not finite: with the state before it."""
        state = self.state
        if not state.undo_frozen():
            return
        with self.ranks.together():  # until it is saved, however long that takes
            raise self._not_finite()

    def _not_finite(self) -> RunError:
        """What to say of a step that was not finite, once what was before it is saved."""
        found = self.state.diagnosis()
        saved = self.recorder.rescue(found) if self.recorder is not None else ""
        return RunError(explain(found, saved, self.config), everywhere=True)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Count the block's time to a phase, not to training; steps still queued on a GPU end
        before it.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin
