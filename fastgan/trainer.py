"""The loop: feed -> step -> statistics; log, sample, save, resume. No tensor arithmetic here."""

from __future__ import annotations

import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, checkpoint, compiling, console
from .config import TrainConfig, to_plain
from .data.feed import Batch
from .data.loader import Data, open_data, open_feed
from .data.on_the_fly import OnTheFly
from .data.prepare import default_root
from .env import environment, machine_line
from .errors import RunError, UsageError, is_out_of_memory
from .graph import Graphed, warm_up
from .models import Discriminator, Generator, init_weights
from .modes import Modes, pick_modes
from .optim import Ema, Trained, copy_into
from .paths import absolute, check_folder
from .resume import run_of, run_to_resume
from .runlog import Run
from .samples import generate, grid, latents, save_picture
from .signals import noted
from .stats import Accumulator, StatsLog
from .step import Step

# Where an interval is not given it is this share of the run.
TICK_SHARE, SAMPLE_SHARE, SAVE_SHARE = 1 / 100, 1 / 20, 1 / 4


def train(config: TrainConfig, resume: str | None = None) -> int:
    """`fastgan train`: returns 0, or 128 + the signal that ended the run after a save."""
    config = config.model_copy(update={"data": absolute(config.data, "--data")})
    modes = pick_modes(config)  # refused before anything is decoded
    start = run_to_resume(config, resume)
    if start is None:
        check_folder(config.out, "--out")
    data = open_data(config)
    if modes.compile:
        compiling.keep_in((config.cache or default_root()) / "compiled")
    try:
        with (
            closing(data),
            closing(Trainer(config, data, modes)) as trainer,
            # the lock before the checkpoint: what is loaded must be the last that was written
            closing(Run.create(config) if start is None else Run(run_of(start))) as run,
        ):
            return _train_in(run, trainer, start)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory at --batch {config.batch}, --size {config.size}, --width "
            f"{config.width}, --latent {config.latent}: lower one of them"
            f"{' or add --amp' if not config.amp else ''} ({str(error).splitlines()[0]})"
        ) from None


def _train_in(run: Run, trainer: Trainer, start: Path | None) -> int:
    if start is not None:
        trainer.load(checkpoint.find(start))
        if trainer.step_count >= trainer.total_steps:
            console.say(
                f"{run.path} has its {trainer.images / 1000:g} kimg: nothing to do "
                "(a larger --kimg or --epochs goes on)"
            )
            return 0
    try:
        (run.path / "samples").mkdir(exist_ok=True)
        with open(run.path / "log.txt", "a", encoding="utf-8") as log, console.log_to(log):
            return trainer.run(run)
    except OSError as error:
        raise RunError(f"the run {run.path} cannot be written: {error}") from None


class Trainer:
    """Everything that a run consists of, and the loop over it."""

    def __init__(self, config: TrainConfig, data: Data, modes: Modes) -> None:
        self.config, self.data, self.modes = config, data, modes
        self.device = device = modes.device
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes never change: the search pays at once
        random = torch.Generator().manual_seed(config.seed)
        shape = (config.size, config.latent, config.width, config.pixel_range, modes.impl)
        g, d = Generator(*shape), Discriminator(config.size, config.width, modes.impl)
        average = Generator(*shape)
        init_weights(g, random)
        init_weights(d, random)
        for network in (g, d, average):
            network.to(device).to(memory_format=torch.channels_last)
        self.ema = Ema(g, average, config.batch, config.ema_kimg * 1000)
        betas, low, impl = (config.beta1, config.beta2), modes.low, modes.impl
        self.g = Trained(g, config.lr_g, betas, low=low, ema=self.ema, impl=impl)
        self.d = Trained(d, config.lr_d, betas, low=low, impl=impl)
        self.random = torch.Generator(device).manual_seed(config.seed)
        self.feed, self.loader = open_feed(data, config, device)
        self.step = Step(
            self.g,
            self.d,
            self.ema,
            batch=config.batch,
            random=self.random,
            pixel_range=config.pixel_range,
            # two small passes stay in a CPU's caches: 140 img/s against 119 (width 64, batch 128)
            one_pass=device.type == "cuda",
            flip=config.flip,
            compile=modes.compile,
            impl=impl,
        )
        self.stats = Accumulator(device)
        self.advance: Callable[[Batch], Any] = self._advance
        self.step_count = 0
        epochs_img = (config.epochs or 0) * data.count
        self.total_steps = math.ceil((epochs_img or (config.kimg or 0) * 1000) / config.batch)
        self.seconds = {"sample": 0.0, "save": 0.0}  # since the last tick
        self.resumed_from: Path | None = None

    def close(self) -> None:
        """End what works ahead of the steps."""
        self.feed.close()

    @property
    def images(self) -> int:
        """Real images that the steps so far have taken."""
        return self.step_count * self.config.batch

    def run(self, run: Run) -> int:
        """Train to the end, or to a signal; the status in run.json says which."""
        run.write("config.json", to_plain(self.config))
        run.write("env.json", environment(self.device))
        moved = checkpoint.set_aside_newer(run.path, self.images)
        self.log = StatsLog(run.path, self.step_count)
        if isinstance(self.data, OnTheFly):
            self.data.list_refused_in(run.path)
        self._announce(run)
        if moved:
            console.say(f"set aside  {len(moved)} later checkpoints, now in {moved[0].parent}")
        run.status("running", self.step_count, self.images)
        try:
            self.warm_up()  # before signals wait for a step: there is nothing to save yet
            with noted() as caught:
                if not self.step_count:
                    self._first_pictures(run)
                with compiling.no_recompiles(self.modes.compile):
                    self._loop(run, caught)
                self._finish(run)
        except BaseException as error:
            ended = "failed" if isinstance(error, Exception) else "preempted"
            with suppress(OSError):  # a full disk is told by the error that it ended the run with
                run.status(ended, self.step_count, self.images)
            raise
        if self.step_count >= self.total_steps:
            run.status("done", self.step_count, self.images)
            console.say(f"done: {self.images / 1000:g} kimg; everything is in {run.path}")
            return 0
        run.status("preempted", self.step_count, self.images)
        console.say(
            f"stopped at {self.images / 1000:g} kimg by {signal.Signals(caught[0]).name}, saved; "
            f"fastgan train --resume {shlex.quote(str(run.path))} goes on"
        )
        return 128 + caught[0]

    def _advance(self, batch: Batch) -> None:
        self.stats.add(self.step(batch))

    def warm_up(self) -> None:
        """Compile the step and capture it, where that is on: a few steps that leave no trace."""
        if not (self.modes.compile or self.modes.graph):
            return
        if self.modes.compile:
            console.say("warm-up    compiling: up to a minute, unless an earlier run did")
        began = time.perf_counter()
        index = torch.arange(self.config.batch, device=self.device) % len(self.feed.images)
        batch = Batch(self.feed.images, index)
        state = [*self.step.tensors(), self.stats.sums]
        with compiling.explained():
            if self.modes.graph:
                self.advance = Graphed(self._advance, batch, state, self.random)
            else:
                warm_up(self._advance, batch, state, self.random)
        console.say(f"ready      after a warm-up of {time.perf_counter() - began:.1f} s")

    def _loop(self, run: Run, caught: list[int]) -> None:
        config = self.config
        total_kimg = self.total_steps * config.batch / 1000
        self.tick_start, self.tick_images = time.perf_counter(), self.images
        self.began = self.tick_start
        self.seconds = dict.fromkeys(self.seconds, 0.0)  # the first pictures came before
        with console.bar("training", total_kimg, "kimg", self.images / 1000) as bar:
            while self.step_count < self.total_steps and not caught:
                self.advance(self._next_batch(run))
                self.step_count += 1
                bar.update(self.images / 1000, bar.note or "first tick")
                if self._due(config.tick_kimg, TICK_SHARE):
                    row = self._tick()
                    bar.update(self.images / 1000, f"{row['img_per_s']:,.0f} img/s")
                if self.step_count == self.total_steps:
                    break  # the end has a grid and a checkpoint of its own
                if self._due(config.sample_kimg, SAMPLE_SHARE):
                    self._sample(run)
                if self._due(config.save_kimg, SAVE_SHARE):
                    self._save(run)

    def _next_batch(self, run: Run) -> Batch:
        """From the feed; what it cannot give ends the run with a checkpoint."""
        try:
            return self.feed.next()
        except (UsageError, RunError) as error:
            if not self.step_count:
                raise
            self._save(run)
            raise RunError(
                f"{error}; saved at {self.images / 1000:g} kimg: once that is mended, fastgan "
                f"train --resume {shlex.quote(str(run.path))} goes on"
            ) from None

    def _due(self, every_kimg: float | None, share: float) -> bool:
        """Whether the last step crossed a multiple of the interval: a function of the step."""
        batch = self.config.batch
        every = every_kimg * 1000 if every_kimg else share * self.total_steps * batch
        return self.images // every != (self.images - batch) // every

    def _finish(self, run: Run) -> None:
        ticked = self.log.rows[-1]["step"] if self.log.rows else 0
        if self.step_count >= self.total_steps > ticked:
            self._tick()
        self._save(run)  # before the picture: it is what must not be lost
        self._sample(run)

    def _tick(self) -> dict[str, Any]:
        """Read the statistics since the last tick (the one host sync) and log them."""
        means = self.stats.take()
        now = time.perf_counter()
        seconds = {"train": now - self.tick_start - sum(self.seconds.values()), **self.seconds}
        images = self.images - self.tick_images
        row = {
            "step": self.step_count,
            "kimg": self.images / 1000,
            "epoch": self.images / self.data.count,
            **means,
            "img_per_s": images / seconds["train"],
            "s_per_kimg": 1000 * seconds["train"] / images,
            "gpu_memory_bytes": (
                torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            ),
            "seconds": seconds,
            "elapsed_s": now - self.began,
        }
        self.log.add(row)
        self.tick_start, self.tick_images = now, self.images
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return row

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

    def _first_pictures(self, run: Run) -> None:
        """Real images, spread over the set, and what the untrained generator makes of the fixed
        latents.
        """
        count = min(self.config.grid, self.data.count)
        spread = np.linspace(0, self.data.count - 1, count).astype(np.int64)
        real = torch.from_numpy(self.data.pictures(spread))
        save_picture(grid(real), run.path / "samples" / "real.png")
        self._sample(run)

    def _sample(self, run: Run) -> None:
        """The grid of the fixed latents, from the averaged generator; and the curves so far."""
        path = run.path / "samples" / f"fake-{checkpoint.kimg_name(self.images)}.png"
        with self._timed("sample"):
            fixed = latents(self.config.seed, self.config.grid, self.config.latent)
            save_picture(grid(torch.cat(list(generate(self.ema.network, fixed)))), path)
            self.log.plot()
        line = f"{self.images / 1000:8.1f} kimg  "
        if self.log.rows:
            row = self.log.rows[-1]
            line += (
                f"D {row['d_loss']:.3f}  G {row['g_loss']:.3f}  D(x) {row['d_real']:.2f}  "
                f"D(G(z)) {row['d_fake']:.2f}  {row['img_per_s']:,.0f} img/s  "
            )
        console.say(f"{line}{path.name}")

    def _save(self, run: Run) -> None:
        with self._timed("save"):
            checkpoint.save(run.path / "checkpoints", self.images, self._parts(), self._meta())
            checkpoint.prune(run.path, self.config.keep_checkpoints)
            run.status("running", self.step_count, self.images)

    def _parts(self) -> dict[str, dict[str, torch.Tensor]]:
        networks = {"g": self.g.network, "d": self.d.network, "ema": self.ema.network}
        return {
            "model": _prefixed({name: net.state_dict() for name, net in networks.items()}),
            "optim": _prefixed({"g": self.g.state(), "d": self.d.state()}),
            "state": {
                "random.latents": self.random.get_state(),
                "ema.steps": self.ema.steps,
                "stats.sums": self.stats.sums,
                **_prefixed({"loss_scale": self.step.scale.tensors()}),
            },
        }

    def _meta(self) -> dict[str, Any]:
        return {
            "fastgan": __version__,
            "step": self.step_count,
            "device": self.device.type,
            "feed": self.feed.state_dict(),
            "data": {"identity": self.data.identity, "count": self.data.count},
            "config": to_plain(self.config),
        }

    def load(self, start: checkpoint.Checkpoint) -> None:
        """Put every number back where it was when the checkpoint was written."""
        meta, data = start.meta, start.meta["data"]
        if data.get("identity") == self.data.identity and data.get("count") != self.data.count:
            was = meta["config"]
            raise UsageError(
                f"--data {self.config.data} has {self.data.count:,} images by --loader "
                f"{self.config.loader} and --decoder {self.config.decoder}, and had "
                f"{data.get('count', 0):,} by {was.get('loader')} and {was.get('decoder')}: a "
                "cache leaves out what cannot be decoded, on the fly others stand in for it; go on "
                "with those"
            )
        if data.get("identity") != self.data.identity:
            raise UsageError(
                f"--data {self.config.data} is not what the run was trained on: "
                f"{data.get('count', 0):,} images then, {self.data.count:,} now, or other files; "
                "start a new run"
            )
        model, optim, state = (start.tensors(part) for part in checkpoint.PARTS)
        under = checkpoint.under
        counts = {"ema.steps": self.ema.steps, "stats.sums": self.stats.sums}
        try:
            self.g.load(under(model, "g."), under(optim, "g."), "g")
            self.d.load(under(model, "d."), under(optim, "d."), "d")
            copy_into(self.ema.network.state_dict(), under(model, "ema."), "ema")
            copy_into(counts, {name: state[name] for name in counts if name in state}, "state")
            scale, saved = self.step.scale.tensors(), under(state, "loss_scale.")
            if scale and saved:  # the run may have been in another precision
                copy_into(scale, saved, "loss scale")
        except ValueError as error:
            raise RunError(f"checkpoint {start.path} does not fit this run: {error}") from None
        if meta["device"] == self.device.type:
            self.random.set_state(state["random.latents"])
        else:  # their generators know nothing of each other
            self.random.manual_seed(self.config.seed + meta["step"])
            console.warn(f"the run was on {meta['device']}: latents go on from a new seed")
        try:
            self.feed.load_state_dict(meta["feed"])
        except ValueError as error:
            raise RunError(f"checkpoint {start.path} is damaged: {error}") from None
        self.step_count = meta["step"]
        self.resumed_from = start.path

    def _announce(self, run: Run) -> None:
        """What is on, and why not where not: printed once, at the start."""
        config = self.config
        sizes = [
            sum(p.numel() for p in net.parameters()) for net in (self.g.network, self.d.network)
        ]
        lines = {
            "fastgan": f"{__version__}, torch {torch.__version__}, {machine_line(self.device)}",
            "data": str(self.data),
            "loader": self.loader,
            "networks": f"G {sizes[0]:,} and D {sizes[1]:,} parameters, channels-last",
            **self.modes.lines,
            "length": (
                f"{self.total_steps * config.batch / 1000:g} kimg, "
                f"{self.total_steps:,} steps of {config.batch}"
            ),
            "run": str(run.path),
        }
        if self.resumed_from is not None:
            lines["resumed"] = f"from {self.resumed_from.name}"
        for name, value in lines.items():
            console.say(f"{name:<10} {value}")


def _prefixed(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{name}": t for group, part in groups.items() for name, t in part.items()}
