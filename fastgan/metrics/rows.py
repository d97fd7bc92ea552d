"""One row of an evaluation: a set of images, and what each metric says of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgan_kernels import BatchNormAct2d

from ..checkpoint import Checkpoint, under
from ..config import PixelRange, TrainConfig
from ..errors import RunError
from ..generators import options_of
from ..losses import Objective
from ..models import AnyGenerator, init_weights, make_discriminator, make_generator
from ..modes import pick_kernels
from ..optim import copy_into
from .baselines import Known
from .c2st import c2st
from .inception import Features, Inception, scores
from .ms_ssim import diversity
from .nearest import Neighbours, neighbours
from .sources import Progress
from .swd import MMAGIC, PROGAN, RealSet

SAMPLES = 16  # whose nearest neighbours are looked for
JUDGED = 2048  # images of each kind that D is shown
CHUNK = 256  # images a pass of D
SETTLING = 256  # latents for the batch norms of an untrained generator
# Seconds on two cores, for the bar alone: of each, and of 1,000 images of 64 px.
COST = {"images": (0, 3), "swd": (0, 2), "swd_mmagic": (0, 2), "ms_ssim": (0, 0.3)}
COST |= {"c2st": (40, 0.3)}
COST |= {"nearest": (1, 0), "d_accuracy": (10, 0), "inception": (15, 70)}
LABELS = {"images": "making images", "swd": "SWD", "swd_mmagic": "SWD (mmagic's form)"}
LABELS |= {"ms_ssim": "MS-SSIM", "c2st": "C2ST"}
LABELS |= {"nearest": "nearest neighbours", "d_accuracy": "D", "inception": "Inception"}

FORMS = {"swd": PROGAN, "swd_mmagic": MMAGIC}

Made = Callable[[Progress], np.ndarray]


class Shown(Protocol):
    """What shows how far the work is, as `console.Bar` does."""

    def update(self, done: float, note: str) -> None: ...


@dataclass
class Row:
    """A set of images.

    Attributes:
        role: real, model, against, untrained or noise.
        make: its images, uint8 [n, size, size, 3].
        todo: the metrics that are to be measured.
        kept_as: its name among the baselines whose results are kept.
        results: by metric.
        neighbours: of its first images, where these were measured.
    """

    role: str
    name: str
    make: Made
    todo: Sequence[str]
    kept_as: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    neighbours: Neighbours | None = None

    @property
    def missing(self) -> list[str]:
        return [metric for metric in self.todo if metric not in self.results]


class Work:
    """How far an evaluation is, and what took the time: `seconds`, by kind of work."""

    def __init__(self, bar: Shown) -> None:
        self.seconds: dict[str, float] = {}
        self._bar = bar
        self._done = 0.0

    @contextmanager
    def doing(self, kind: str, count: int, of: str) -> Iterator[Progress]:
        """Around a piece of work on `count` images; gives what is told how many are done."""
        cost, note = cost_of(kind, count), f"{LABELS[kind]}: {of}"
        self._bar.update(self._done, note)
        began = time.perf_counter()
        yield lambda done: self._bar.update(self._done + cost * min(done / count, 1), note)
        self.seconds[kind] = self.seconds.get(kind, 0) + time.perf_counter() - began
        self._done += cost
        self._bar.update(self._done, note)


def cost_of(kind: str, count: int) -> float:
    """Seconds that a piece of work may take."""
    fixed, each = COST[kind]
    return fixed + each * count / 1000


class Judge:
    """Measures rows against one half of the real images.

    Attributes:
        count: images of each row.
        held_out: real images for C2ST that training never saw; without them it takes that half.
    """

    def __init__(
        self,
        real: np.ndarray,
        train: np.ndarray,
        held_out: np.ndarray | None,
        known: Known,
        inception: Inception | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.real, self.train, self.held_out = real, train, held_out
        self.count, self.seed, self.device = len(real), seed, device
        self._known, self._inception = known, inception
        self._projected: dict[str, RealSet] = {}
        self._real_features: Features | None = None

    def recall(self, row: Row) -> None:
        """Fill in what is known of a baseline."""
        if row.kept_as is not None:
            kept = self._known.of(row.kept_as)
            row.results |= {metric: kept[metric] for metric in row.todo if metric in kept}

    def measure(self, row: Row, work: Work) -> np.ndarray | None:
        """Fill in what a row misses; returns its images, None where it misses nothing."""
        if not row.missing:
            return None
        with work.doing("images", self.count, row.name) as progress:
            images = row.make(progress)
        for metric in row.missing:
            if metric in FORMS and metric not in self._projected:
                with work.doing(metric, self.count, "the real images") as progress:
                    self._projected[metric] = RealSet(
                        self.real, seed=self.seed, form=FORMS[metric], progress=progress
                    )
            with work.doing(metric, self.count, row.name) as progress:
                row.results[metric] = self._measured(metric, row, images, progress)
            if row.kept_as is not None:
                self._known.add(row.kept_as, {metric: row.results[metric]})
        return images

    def _measured(self, metric: str, row: Row, images: np.ndarray, progress: Progress) -> Any:
        if metric in FORMS:
            distance = self._projected[metric].swd(images, progress=progress)
            return {"mean": distance.mean, **{str(k): v for k, v in distance.levels.items()}}
        if metric == "ms_ssim":
            return diversity(images, seed=self.seed, progress=progress)
        if metric == "c2st":
            real = self.real if self.held_out is None else self.held_out
            told = c2st(real, images, seed=self.seed, device=self.device, progress=progress)
            return asdict(told)
        if metric == "nearest":
            shown = images[:SAMPLES]
            row.neighbours = neighbours(shown, self.train)
            return {"ratio": row.neighbours.ratio, "samples": len(shown)}
        assert metric == "inception" and self._inception is not None
        theirs = self._inception.features(images, progress)
        return scores(self._features_of_real(progress), theirs)

    def _features_of_real(self, progress: Progress) -> Features:
        assert self._inception is not None
        if self._real_features is not None:
            return self._real_features
        if (kept := self._known.features()) is not None and len(kept[0]) == self.count:
            self._real_features = Features(*kept)
        else:
            self._real_features = self._inception.features(self.real, progress)
            self._known.keep_features(self._real_features.pool, self._real_features.logits)
        return self._real_features


def untrained(generator: AnyGenerator, seed: int, device: torch.device) -> AnyGenerator:
    """A generator of the same shape with new weights.

    Its batch norms have the statistics of one batch of latents, as in the first step of training:
    by those that they are made with it would give a flat grey.
    """
    impl, _ = pick_kernels("auto", device)
    new = make_generator(options_of(generator), impl)
    random = torch.Generator().manual_seed(seed)
    init_weights(new, random)
    new.to(device).to(memory_format=torch.channels_last)
    norms = [module for module in new.modules() if isinstance(module, BatchNormAct2d)]
    if not norms:
        return new.eval()
    for norm in norms:
        norm.momentum = 1.0
    drawn = torch.empty(SETTLING, generator.latent)
    if generator.latent_dist == "uniform":
        drawn.uniform_(-1, 1, generator=random)
    else:
        drawn.normal_(generator=random)
    with torch.no_grad():
        new.train()(drawn.to(device))
    return new.eval()


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """uint8, each value of each pixel by itself."""
    return np.random.default_rng([seed, 1]).integers(0, 256, shape, np.uint8)


class Critic:
    """The discriminator of a checkpoint, which normalises by its running statistics."""

    def __init__(self, found: Checkpoint, config: TrainConfig, device: torch.device) -> None:
        impl, _ = pick_kernels("auto", device)
        self._network = make_discriminator(config, impl)
        try:
            saved = under(found.tensors("model"), "d.")
            copy_into(self._network.state_dict(), saved, str(found.path))
        except ValueError as error:
            raise RunError(f"the weights do not fit the configuration: {error}") from None
        self._network.to(device).to(memory_format=torch.channels_last).eval()
        self._threshold = Objective(config.loss).threshold
        self._range: PixelRange = config.pixel_range
        self._device = device

    @torch.no_grad()
    def real_share(self, images: np.ndarray) -> float:
        """The share of images that it takes for real."""
        low, high = self._range
        taken = 0
        for start in range(0, len(images), CHUNK):
            pixels = torch.from_numpy(np.array(images[start : start + CHUNK])).to(self._device)
            seen: Tensor = pixels.permute(0, 3, 1, 2).float() * ((high - low) / 255) + low
            taken += int((self._network(seen) > self._threshold).sum())
        return taken / len(images)

    def accuracy(
        self, real: np.ndarray, held_out: np.ndarray, fake: np.ndarray
    ) -> dict[str, float | int | None]:
        """The share of each kind that it tells rightly, of JUDGED images at most."""
        real, held_out, fake = (images[:JUDGED] for images in (real, held_out, fake))
        return {
            "real": self.real_share(real),
            "held_out": self.real_share(held_out) if len(held_out) else None,
            "fake": 1 - self.real_share(fake),
            "count": len(fake),
        }
