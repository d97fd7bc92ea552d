"""What is written of a run while it goes on: its log, statistics, grids, checkpoints and status.

A disk that is full for a while ends no run: what could not be written is said, and training goes
on; only what it ends with must be on the disk.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from . import __version__, checkpoint, console
from .config import TrainConfig, to_plain
from .data.on_the_fly import OnTheFly
from .env import environment, machine_line
from .errors import RunError, first_line, is_out_of_memory
from .latents import latents
from .loggers import TensorBoard
from .models import convolutions_of
from .run_files import GRID
from .runlog import Run
from .samples import generate, grid, save_picture
from .saving import Saver
from .state import State
from .stats import StatsLog
from .watch import Watch


class Recorder:
    """Writes into the folder of an open run what `state` comes to."""

    def __init__(
        self,
        run: Run,
        state: State,
        start: checkpoint.Checkpoint | None = None,
        changed: Sequence[str] = (),
    ) -> None:
        """`start`: the checkpoint that the state is from, if it is not a new run's; `changed`: what
        has changed since, in lines (`resume.check_changes`).
        """
        self.run, self.state, self.data = run, state, state.data
        self.start, self.changed = start, changed
        self.config = state.config
        self.saver = Saver(run.path, self.config.keep_checkpoints)
        self._open = ExitStack()
        self._kept = -1  # images, when it was last on the disk for sure
        self.ended = False
        self.viewer: TensorBoard | None = None
        # of a grid since the last tick
        self._diversity = start.meta.get("diversity") if start is not None else None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and end the log."""
        self.saver.close()
        self._open.close()

    def begin(self) -> None:
        """The files of the run as it starts or goes on, and its first lines.

        Raises:
            RunError: the folder cannot be written.
        """
        run, state = self.run, self.state
        try:
            (run.path / "samples").mkdir(exist_ok=True)
            self._describe()
            moved = checkpoint.set_aside_newer(
                run.path, state.images, self.start.path if self.start is not None else None
            )
            self._set_aside_grids()
            self.log = StatsLog(run.path, state.step_count)
            run.status("running", state.step_count, state.images)
        except OSError as error:
            raise RunError(f"the run {run.path} cannot be written: {error}") from None
        if isinstance(self.data, OnTheFly):
            self.data.list_refused_in(run.path)
        self._open.enter_context(console.log_to(run.path / "log.txt"))
        if self.config.logger == "tensorboard":
            with self._going_on("tensorboard"):
                self.viewer = TensorBoard(run.path, state.images)
                self._open.callback(self.viewer.close)
        spread = np.linspace(0, self.data.count - 1, min(self.config.grid, self.data.count))
        self.real = self.data.pictures(spread.astype(np.int64))
        self.watch = Watch(self.real, self.log.rows, state.step.objective)
        self._announce()
        if moved:
            console.say(f"set aside  {len(moved)} later checkpoints, now in {moved[0].parent}")

    def _set_aside_grids(self) -> None:
        """Move grids of later images into samples/set-aside: they are of another course."""
        samples = self.run.path / "samples"
        for path in samples.iterdir():
            found = GRID.fullmatch(path.name)
            if found and round(float(found[1]) * 1000) > self.state.images:
                (samples / "set-aside").mkdir(exist_ok=True)
                path.replace(samples / "set-aside" / path.name)

    def _describe(self) -> None:
        self.run.write("config.json", to_plain(self.config))
        self.run.write("env.json", environment(self.state.device))

    def first_pictures(self) -> None:
        """Before the first step: real images, spread over the set, and what the untrained generator
        makes of the fixed latents.
        """
        if not self.state.step_count:
            with self._going_on("real.png"):
                save_picture(grid(torch.from_numpy(self.real)), self.run.path / "samples/real.png")
            self.sample()

    def tick(self, row: dict[str, Any]) -> None:
        """A line of statistics; it gets the diversity of a grid since the line before."""
        row["diversity"], self._diversity = self._diversity, None
        with self._going_on("stats.jsonl, losses.npy"):
            self.log.add(row)
        if self.viewer is not None:
            with self._going_on("tensorboard"):
                self.viewer.tick(row)
        self.saver.collect()
        if advice := self.watch.tick(row):
            console.warn(advice)

    def sample(self) -> None:
        """The grid of the fixed latents, from the averaged generator; and the curves so far."""
        state, config = self.state, self.config
        path = self.run.path / "samples" / f"fake-{checkpoint.kimg_name(state.images)}.png"
        fixed = latents(config.seed, config.grid, config.latent, config.latent_dist)
        try:
            images = torch.cat(list(generate(state.ema.network, fixed)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            console.warn(f"no memory for {path.name} ({first_line(error)}); training goes on")
            return
        picture = grid(images)
        with self._going_on(path.name):
            save_picture(picture, path)
        if self.viewer is not None:
            with self._going_on("tensorboard"):
                self.viewer.picture("samples", picture, state.images)
        with self._going_on("losses.png"):
            self.log.plot()
        diversity, advice = self.watch.samples(images.numpy(), state.images / 1000)
        self._diversity = None if math.isnan(diversity) else diversity
        line = f"{state.images / 1000:8.1f} kimg  "
        if self.log.rows:
            row = self.log.rows[-1]
            line += (
                f"D {row['d_loss']:.3f}  G {row['g_loss']:.3f}  D(x) {row['d_real']:.2f}  "
                f"D(G(z)) {row['d_fake']:.2f}  {row['img_per_s']:,.0f} img/s  "
            )
        if self._diversity is not None:
            line += f"diversity {diversity:.2f}  "
        console.say(f"{line}{path.name}")
        if advice:
            console.warn(advice)

    def save(self) -> None:
        """Begin a checkpoint of the state as it is now."""
        with self._going_on("config.json"):
            self._restore()
        meta = {**self.state.meta(), "diversity": self._diversity}
        self.saver.begin(self.state.images, self.state.parts(), meta)
        with self._going_on("run.json"):
            self.run.status("running", self.state.step_count, self.state.images)

    def _restore(self) -> None:
        """Make anew what a checkpoint is nothing without, if the folder was moved or emptied."""
        try:
            os.stat(self.run.path / "config.json")
        except FileNotFoundError:
            console.warn(f"{self.run.path} has been moved or emptied: its files are made anew")
            (self.run.path / "samples").mkdir(parents=True, exist_ok=True)
            self._describe()

    def save_now(self) -> None:
        """A checkpoint that must be on the disk.

        Raises:
            RunError: it could not be written.
        """
        try:
            self.save()
            self.saver.finish()
            self._kept = self.state.images
        except OSError as error:
            raise RunError(
                f"the run {self.run.path} cannot be written: {error}; its last checkpoint is "
                f"{self._newest()}"
            ) from None

    def rescue(self, diagnosis: dict[str, Any]) -> str:
        """Keep what was right until a step that was not finite, and what is known of that; in
        words, what came of it.
        """
        run, said = self.run.path, []
        with self._going_on("diagnosis.json"):
            self.run.write("diagnosis.json", diagnosis)
            said.append(f"what is known of it is in {run / 'diagnosis.json'}")
        try:
            self.save_now()
            said.append(f"what was before it in {checkpoint.kimg_name(self.state.images)}")
        except Exception as error:  # whatever it is, the step's story comes first
            said.append(f"what was before it could not be saved ({first_line(error)})")
        return f"{', '.join(said)}; fastgan train --resume {shlex.quote(str(run))} goes on"

    def end(self, status: str, signal_: int = 0) -> None:
        """How the run ended: done, failed, or preempted (by a signal that it was saved after, if
        that is given).
        """
        state, run = self.state, self.run
        self.ended = True
        try:
            run.status(status, state.step_count, state.images)
        except OSError as error:
            console.warn(f"{run.path}: run.json cannot be written ({error.strerror or error})")
        if status == "done":
            self._report()
            console.say(f"done: {state.images / 1000:g} kimg; everything is in {run.path}")
        elif signal_:
            console.say(
                f"stopped at {state.images / 1000:g} kimg by {signal.Signals(signal_).name}, "
                f"saved; fastgan train --resume {shlex.quote(str(run.path))} goes on"
            )
        elif status == "preempted" and self._kept != state.images:
            console.warn(f"ended at once, not saved; the newest checkpoint is {self._newest()}")

    def _report(self) -> None:
        """The run as a page, without which it is none the worse."""
        try:
            from .report import report  # jinja2 and matplotlib, which training has no need for

            report(self.run.path)
        except Exception as error:  # whatever it is, the run is done
            console.warn(
                f"report.html was not written ({first_line(error)}); fastgan report "
                f"{shlex.quote(str(self.run.path))} tries again"
            )

    def _newest(self) -> str:
        try:
            whole = checkpoint.newest_by_looks(self.run.path)
            return whole.name if whole is not None else "not there"
        except (OSError, RunError) as error:
            return f"not known ({first_line(error)})"

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """What cannot be written is said, and missed."""
        try:
            yield
        except OSError as error:
            console.warn(
                f"{self.run.path}: {what} cannot be written ({error.strerror or error}); training "
                "goes on"
            )

    def _announce(self) -> None:
        """What is on, and why not where not: printed once, at the start."""
        config, state = self.config, self.state
        sizes = [sum(p.numel() for p in side.network.parameters()) for side in (state.g, state.d)]
        lines = {
            "fastgan": f"{__version__}, torch {torch.__version__}, {machine_line(state.device)}",
            "data": str(self.data),
            "loader": state.loader,
            "networks": f"G {sizes[0]:,} and D {sizes[1]:,} parameters, channels-last; "
            f"{convolutions_of(state.g.working)}",
            **({"objective": told} if (told := _objective(config)) else {}),
            **state.modes.lines,
            **({"processes": state.sharing} if state.ranks.world > 1 else {}),
            "length": (
                f"{state.total_images / 1000:g} kimg, {state.total_steps:,} steps of {config.batch}"
            ),
            "run": str(self.run.path),
        }
        if self.start is not None:
            lines["resumed"] = f"from {self.start.path.name}"
        for name, value in lines.items():
            console.say(f"{name:<10} {value}")
        for line in self.changed:
            console.say(line)


def _objective(config: TrainConfig) -> str:
    """What differs from the plain loss, in words; "" where nothing does."""
    told: list[str] = [config.loss] if config.loss != "non-saturating" else []
    if config.label_smoothing:
        told.append(f"real targets {1 - config.label_smoothing:g}")
    if config.latent_dist != "normal":
        told.append(f"{config.latent_dist} latents")
    if config.spectral_norm:
        told.append("spectral norm in D")
    if config.diffaug:
        told.append(f"D sees images by DiffAugment ({', '.join(config.diffaug)})")
    if config.instance_noise:
        falling = f" falling to 0 by {config.noise_kimg:g} kimg" if config.noise_kimg else ""
        told.append(f"noise of {config.instance_noise:g}{falling}")
    if config.r1:
        told.append(
            f"R1 of {config.r1:g} every {config.r1_every} steps, in float32 by PyTorch's operators"
        )
    return "; ".join(told)
