"""What a run computes with (networks, optimizers, random numbers, feed, counters), how that goes
into a checkpoint, and how it comes back.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import __version__, checkpoint, compiling, console
from .config import TrainConfig, to_plain
from .data.feed import Batch
from .data.loader import Data, open_feed
from .distributed import Ranks
from .errors import RunError, UsageError, first_line, is_out_of_memory
from .graph import Graphed, warm_up
from .losses import Objective
from .models import init_weights, make_discriminator, make_generator
from .modes import Modes
from .optim import Ema, Trained, copy_into
from .sight import Sight
from .stats import Accumulator
from .step import Step

AHEAD = 4  # steps of a GPU that the host queues before it waits


class State:
    """A run between two steps.

    Attributes:
        step_count, images: steps so far, and real images that they have taken.
        loader: which feed it has, and why.
    """

    def __init__(
        self, config: TrainConfig, data: Data, modes: Modes, ranks: Ranks | None = None
    ) -> None:
        self.config, self.data, self.modes = config, data, modes
        self.ranks = ranks = ranks or Ranks()
        self.device = device = modes.device
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes never change: the search pays at once
        random = torch.Generator().manual_seed(config.seed)
        g, average = (make_generator(config, modes.impl) for _ in range(2))
        d = make_discriminator(config, modes.impl)
        init_weights(g, random)
        init_weights(d, random)
        for network in (g, d, average):
            network.to(device).to(memory_format=torch.channels_last)
        self.ema = Ema(g, average, config.batch, config.ema_kimg * 1000)
        betas, low, impl = (config.beta1, config.beta2), modes.low, modes.impl
        self.g = Trained(g, config.lr_g, betas, low=low, ema=self.ema, impl=impl)
        self.d = Trained(d, config.lr_d, betas, low=low, impl=impl)
        self.random = torch.Generator(device).manual_seed(config.seed)
        self.feed, self.loader = open_feed(data, config, device, ranks.rank, ranks.world)
        self.step = Step(
            self.g,
            self.d,
            self.ema,
            batch=config.batch,
            random=self.random,
            objective=Objective(config.loss, config.label_smoothing),
            sight=self._sight(),
            penalty=config.r1 / 2 * config.r1_every,
            pixel_range=config.pixel_range,
            # two small passes stay in a CPU's caches: 140 img/s against 119 (width 64, batch 128)
            one_pass=device.type == "cuda",
            flip=config.flip,
            compile=modes.compile,
            impl=impl,
            ranks=ranks,
            sync_bn=config.sync_bn,
        )
        self.stats = Accumulator(device, impl)
        self.advance: Callable[[Batch], Any] = self._advance
        self.penalised: Callable[[Batch], Any] = self._penalised  # the same with R1
        self.step_count = self.images = 0
        self._looked = (0, self.random.get_state())  # at the last step known to be finite
        self._pace = Pace(device)

    def close(self) -> None:
        """End what works ahead of the steps, and let go of the graph: NCCL waits for that."""
        self.feed.close()
        self.advance, self.penalised = self._advance, self._penalised

    def _sight(self) -> Sight | None:
        """What D sees of images, where that is not all."""
        config, ranks = self.config, self.ranks
        if not (config.diffaug or config.instance_noise):
            return None
        return Sight(
            config.size,
            config.batch,
            ranks.share_of(config.batch),
            config.diffaug,
            config.instance_noise,
            pixel_range=config.pixel_range,
            device=self.device,
        )

    @property
    def total_steps(self) -> int:
        """How many steps the run has in all."""
        config = self.config
        total = (config.epochs or 0) * self.data.count or (config.kimg or 0) * 1000
        return self.step_count + max(0, math.ceil((total - self.images) / config.batch))

    @property
    def total_images(self) -> int:
        """How many real images those steps take."""
        return self.images + (self.total_steps - self.step_count) * self.config.batch

    @property
    def skipped(self) -> int | None:
        """Steps skipped for an overflow so far, in float16; waits for the device."""
        return int(self.step.scale.skipped) if self.step.scale.enabled else None

    @property
    def sharing(self) -> str:
        """How the processes share a step, in words."""
        ranks = self.ranks
        norm = "the statistics of the whole batch (--sync-bn)"
        if not self.config.sync_bn:
            norm = "each its own statistics (--sync-bn: the whole batch's); rank 0's are kept"
        how = "NCCL" if self.device.type == "cuda" else "gloo"
        share = self.config.batch // ranks.world
        return f"{ranks.world} by {how}, {share} images each; batch norm by {norm}"

    def take(self, batch: Batch) -> None:
        """One step, of the feed's next batch."""
        self._pace.wait()
        self._set_noise()
        penalised = self.config.r1 and self.step_count % self.config.r1_every == 0
        (self.penalised if penalised else self.advance)(batch)
        self.step_count += 1
        self.images += self.config.batch

    def _advance(self, batch: Batch) -> None:
        self.stats.add(self.step(batch), self.step.health.frozen)

    def _penalised(self, batch: Batch) -> None:
        self.stats.add(self.step(batch, penalised=True), self.step.health.frozen)

    def _set_noise(self) -> None:
        """The noise's standard deviation in the step to come: a function of the images so far."""
        config, sight = self.config, self.step.sight
        if config.noise_kimg is not None and sight is not None and sight.noise_std is not None:
            left = max(0.0, 1 - self.images / (config.noise_kimg * 1000))
            sight.noise_std.fill_(config.instance_noise * left)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that a step changes and a later one reads."""
        return [*self.step.tensors(), *self.stats.tensors().values()]

    def warm_up(self) -> None:
        """Compile the step and capture it, where that is on: a few steps that leave no trace."""
        if not (self.modes.compile or self.modes.graph):
            return
        if self.modes.compile:
            console.say("warm-up    compiling: up to a minute, unless an earlier run did")
        began = time.perf_counter()
        share = self.config.batch // self.ranks.world
        index = torch.arange(share, device=self.device) % len(self.feed.images)
        batch = Batch(self.feed.images, index)
        with compiling.explained():
            state = (batch, self.tensors(), self.random)
            r1, plain = self.config.r1 > 0, None
            if not self.modes.graph:
                warm_up(self._penalised if r1 else self._advance, *state)
            if self.modes.graph and not (r1 and self.config.r1_every == 1):
                self.advance = plain = Graphed(self._advance, *state)
            if self.modes.graph and r1:
                self.penalised = Graphed(self._penalised, *state, beside=plain)
        console.say(f"ready      after a warm-up of {time.perf_counter() - began:.1f} s")

    def undo_frozen(self) -> int:
        """Go back over the steps that changed nothing, since one of them was not finite
        (`health.py`): their number, 0 if there are none. Waits for the device.
        """
        frozen = int(self.step.health.frozen)
        if frozen:
            self.feed.rewind(frozen)
            self.step_count -= frozen
            self.images -= frozen * self.config.batch
            at, state = self._looked
            self.random.set_state(state)
            for _ in range(self.step_count - at):
                self.step.draw()
        self._looked = (self.step_count, self.random.get_state())
        return frozen

    def diagnosis(self) -> dict[str, Any]:
        """What is known of the step that was not finite, after `undo_frozen` (JSON values); from
        here on it is out of the statistics, too.
        """
        found = {
            "step": self.step_count + 1,
            "kimg": (self.images + self.config.batch) / 1000,
            "loss_scale": float(self.step.scale.scale) if self.step.scale.enabled else None,
            "networks": self.step.health.diagnosis(),
            "last_steps": self.stats.last(self.step_count + 1),
        }
        self.stats.drop_last()
        return found

    # Into a checkpoint, and back.

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every number of the run, as it is now: the tensors go on changing."""
        networks = {"g": self.g.network, "d": self.d.network, "ema": self.ema.network}
        return {
            "model": _prefixed({name: net.state_dict() for name, net in networks.items()}),
            "optim": _prefixed({"g": self.g.state(), "d": self.d.state()}),
            "state": {
                "random.latents": self.random.get_state(),
                "ema.steps": self.ema.steps,
                **_prefixed({"stats": self.stats.tensors()}),
                **_prefixed({"loss_scale": self.step.scale.tensors()}),
            },
        }

    def meta(self) -> dict[str, Any]:
        """What else a checkpoint holds, as JSON values."""
        return {
            "fastgan": __version__,
            "step": self.step_count,
            "device": self.device.type,
            "world": self.ranks.world,
            "feed": self.feed.state_dict(),
            "data": {"identity": self.data.identity, "count": self.data.count},
            "config": to_plain(self.config),
        }

    def load(
        self,
        start: checkpoint.Checkpoint | None,
        other_images: bool = False,
        elastic: bool = False,
    ) -> None:
        """Put every number back where it was when the checkpoint was written.

        Args:
            start: on rank 0, which gives the others what it holds.
            other_images: the set may differ.
            elastic: the number of processes may differ.

        Raises:
            UsageError: the data or the number of processes are others.
            RunError: the checkpoint does not fit.
        """
        held = None
        if start is not None:
            held = {**start.meta, "name": start.path.name}
        meta = self.ranks.share(held)
        random = self.random.get_state()
        with self.ranks.together():
            self._check_world(meta, elastic)
            feed = self._feed_position(meta, other_images)
            if start is not None:
                random = self._take(start)
            try:
                self.feed.load_state_dict(feed)
            except ValueError as error:
                raise RunError(f"checkpoint {meta['name']} is damaged: {error}") from None
        self.ranks.broadcast_([*self.tensors(), random])
        self.random.set_state(random)
        self.step_count, self.images = meta["step"], meta["images"]
        self._looked = (self.step_count, random)

    def _take(self, start: checkpoint.Checkpoint) -> torch.Tensor:
        """A checkpoint's numbers; returns the state of the random numbers to go on from."""
        meta = start.meta
        model, optim, state = (start.tensors(part) for part in checkpoint.PARTS)
        under = checkpoint.under
        counts = {"ema.steps": self.ema.steps, **_prefixed({"stats": self.stats.tensors()})}
        try:
            self.g.load(under(model, "g."), under(optim, "g."), "g")
            self.d.load(under(model, "d."), under(optim, "d."), "d")
            copy_into(self.ema.network.state_dict(), under(model, "ema."), "ema")
            copy_into(counts, {name: state[name] for name in counts if name in state}, "state")
            scale, saved = self.step.scale.tensors(), under(state, "loss_scale.")
            if scale and saved:  # the run may have been in another precision
                copy_into(scale, saved, "loss scale")
            # its unit is a step, of the batch that the run had
            self.ema.steps.mul_(meta["config"]["batch"] / self.config.batch)
            if meta["device"] == self.device.type:
                self.random.set_state(state["random.latents"])
                return state["random.latents"]
        except (ValueError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            raise RunError(f"checkpoint {start.path} does not fit this run: {reason}") from None
        # their generators know nothing of each other
        console.warn(f"the run was on {meta['device']}: latents go on from a new seed")
        return self.random.manual_seed(self.config.seed + meta["step"]).get_state()

    def _check_world(self, meta: dict[str, Any], elastic: bool) -> None:
        was, now = meta["world"], self.ranks.world
        if was == now:
            return
        if not elastic:
            raise UsageError(
                f"the run was in {_processes(was)}, and this is {_processes(now)}: start {was}, or "
                "go on with --elastic (the same images in the same order; not the same bits, since "
                "sums are added in another order, and batch norm without --sync-bn sees other "
                "shares)"
            )
        console.say(
            f"elastic    {was} -> {_processes(now)}: the same images in the same order, "
            "not the same bits"
        )

    def _feed_position(self, meta: dict[str, Any], other_images: bool) -> dict[str, int]:
        """Where the feed goes on."""
        data, config = meta["data"], self.config
        identity, count = data.get("identity"), data.get("count", 0)
        if identity is None:  # of the first format: all that is known is how many there were
            console.warn("an old checkpoint: whether the images are the same cannot be checked")
            identity = self.data.identity
        same = (identity, count) == (self.data.identity, self.data.count)
        if not same and other_images:
            console.say(f"changed    the set: {count:,} -> {self.data.count:,} images")
            epoch, offset = divmod(meta["images"], self.data.count)
            return {"epoch": epoch, "offset": offset}
        if identity != self.data.identity:
            raise UsageError(
                f"--data {config.data} is not what the run was trained on: {count:,} images then, "
                f"{self.data.count:,} now, or other files; start a new run, or go on with "
                "--allow-change data"
            )
        if not same:
            was = meta["config"]
            raise UsageError(
                f"--data {config.data} has {self.data.count:,} images by --loader "
                f"{config.loader} and --decoder {config.decoder}, and had {count:,} by "
                f"{was.get('loader')} and {was.get('decoder')}: a cache leaves out what cannot be "
                "decoded, on the fly others stand in for it; go on with those, or with "
                "--allow-change data"
            )
        return meta["feed"]

    # Among several processes.

    def check_same_data(self) -> None:
        """`RunError` unless every rank has the same images."""
        named = json.dumps([self.data.identity, self.data.count], sort_keys=True).encode()
        if not self.ranks.same(int.from_bytes(hashlib.sha256(named).digest()[:6])):
            raise RunError(
                f"--data {self.config.data} is not the same set for all ranks: let all of them "
                "read one folder, or copies with the same names, sizes and times",
                everywhere=True,
            )

    def check_same_weights(self) -> None:
        """`RunError` unless every rank has the same weights and moments, to the last bit."""
        if self.ranks.world == 1:
            return
        tensors = [t for side in (self.g, self.d) for t in side.state().values()]
        tensors += [p for side in (self.g, self.d) for p in side.network.parameters()]
        if not self.ranks.same(_fingerprint(tensors)):
            raise RunError(
                f"the ranks' weights have come apart by step {self.step_count:,}: one of them "
                "computes otherwise (another card, another library?); go on from the checkpoint "
                "before, on machines that are alike",
                everywhere=True,
            )


class Pace:
    """Keeps the host a few steps ahead of a GPU, and no more: what is asked of the run, to stop by
    a signal first of all, would else come after a thousand steps that are queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._ends: deque[torch.cuda.Event] = deque()
        self._on_gpu = device.type == "cuda"

    def wait(self) -> None:
        """Before a step is queued."""
        if not self._on_gpu:
            return
        end = self._ends.popleft() if len(self._ends) == AHEAD else torch.cuda.Event()
        end.synchronize()
        end.record()
        self._ends.append(end)


@torch.no_grad()
def _fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """48 bits that depend on each bit and its place, in integers: in whatever order a device adds
    them up.
    """
    total = torch.zeros((), dtype=torch.int64)
    for t in tensors:
        words = t.detach().contiguous().view(-1).view(torch.int32).to(torch.int64)
        places = torch.arange(1, 2 * len(words), 2, device=t.device)  # odd: no bit is lost
        total = total * 31 + (words * places).sum().cpu()
    return int(total) & (2**48 - 1)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _prefixed(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{name}": t for group, part in groups.items() for name, t in part.items()}
