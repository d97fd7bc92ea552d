"""Whether training goes anywhere, from the numbers that a run writes anyhow: it warns, and stops
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .losses import Objective

# Both networks learn from an image as far as they are wrong about it: D by 1 - D(x) and D(G(z)),
# G by 1 - D(G(z)), each 0.5 where D cannot tell. G learns on where D is far ahead: a run that went
# well had ticks of D(x) 0.990, D(G(z)) 0.009 (--beta1 0.9). With G's rate at 1e-6 they pass 0.995
# and 0.005 in 60 steps, for good; with D's at 1e-6 D(G(z)) passes 0.99 in 40. These are of the
# default losses; of others `_shares` says what the networks learn from, by their formulas.
SATURATED = 0.005  # both of D's below it
FOOLED = 0.01  # G's below it
OVER = 4  # times the limit, and it is over
# For so long. On CelebA the tutorial's D is as sure at step 150 and no longer at 200.
TICKS, TICK_STEPS = 5, 500

GRIDS = 2  # in a row
FALLEN = 0.5  # of the best diversity so far; runs that went well never had less than 0.8 of it
FALL_FROM = 0.2  # below it there is nothing to fall from: a new generator's images are all grey
# Runs that went well came to 0.25 in 110 to 500 steps, and to 0.5 and more in 1,000.
ALIKE, ALIKE_STEPS = 0.25, 1000
RISEN = 1.3  # times the limit, and it is over

EDGE = 16  # pixels a side that images are compared at, and up to 31: G's checkerboards do not count
MOST = 256  # images of a grid that are compared
FEWEST = 4  # of fewer nothing is said

# D(x) - D(G(z)) beyond which one of them is called ahead.
D_AHEAD, G_AHEAD = 0.8, 0.25

OLDER = "with --resume an older checkpoint goes on from there with other rates"


def diversity(images: ArrayLike) -> float:
    """How unlike images are, in grey levels: the mean distance from each to the nearest other, as
    the root of the mean square over pixels and colours, of images made small.

    Few faces over and over come near to 0, as one does; a standard deviation would not see it. More
    images are nearer to each other: only equal N compare.

    Args:
        images: uint8 [N, H, W, 3], N >= 2.
    """
    small = _small(np.asarray(images))
    nearest = [np.delete(((small - one) ** 2).mean(1), i).min() for i, one in enumerate(small)]
    return float(np.sqrt(nearest).mean())


class Watch:
    """Warns when training goes nowhere: one of the networks has won, or samples are alike.

    A warning comes once, and again only after its cause had gone.
    """

    def __init__(
        self,
        real: ArrayLike,
        rows: Iterable[Mapping[str, Any]] = (),
        objective: Objective | None = None,
    ) -> None:
        """
        Args:
            real: real images, uint8 [N, H, W, 3], as many as a grid has.
            objective: what the networks minimise (default: the non-saturating losses).
            rows: the lines of stats.jsonl so far, of a run that goes on: what they gave reason to
                warn of is not told again. Where one has a "diversity" (that of a grid since the
                line before), the best so far is known again, too.
        """
        self._real, self._objective = _checked(real), objective or Objective()
        self._of_real: dict[int, float] = {}  # the diversity of so many
        self._saturated = _Episode(TICKS, TICK_STEPS)
        self._fooled = _Episode(TICKS, TICK_STEPS)
        self._alike = _Episode(GRIDS, 0)
        self._last: Mapping[str, Any] = {"step": 0, "kimg": 0.0, "d_real": 0.5, "d_fake": 0.5}
        self._best = self._best_kimg = 0.0
        for row in rows:
            self.tick(row)
            if len(self._real) >= FEWEST and (value := row.get("diversity")) is not None:
                self._judge(value, row["kimg"])

    def tick(self, row: Mapping[str, Any]) -> str | None:
        """A line of stats.jsonl (of it step, kimg, d_real and d_fake, with hinge d_loss): a
        warning, or None.
        """
        real, fake, step = row["d_real"], row["d_fake"], row["step"]
        start, self._last = self._last, row
        d_share, g_share = self._shares(row)
        saturated = self._saturated.see(
            d_share < SATURATED, d_share > OVER * SATURATED, start["kimg"], start["step"], step
        )
        fooled = self._fooled.see(
            g_share < FOOLED, g_share > OVER * FOOLED, start["kimg"], start["step"], step
        )
        if saturated:
            return (
                f"D has told all real images from G's since {self._saturated.kimg:g} kimg (now "
                f"D(x) {real:.4f}, D(G(z)) {fake:.4f}) and hardly learns any more: lower --lr-d or "
                "raise --lr-g, with --beta1 at most 0.5; a D that knows few images by heart needs "
                f"more of them, or --flip; {OLDER}"
            )
        if fooled and self._objective.loss == "minimax":
            return (
                f"D has told G's images since {self._fooled.kimg:g} kimg (now D(x) {real:.4f}, "
                f"D(G(z)) {fake:.4f}), where --loss minimax gives G nothing to learn from: lower "
                f"--lr-d, or take --loss non-saturating; {OLDER}"
            )
        if fooled:
            return (
                f"G has fooled D since {self._fooled.kimg:g} kimg (now D(x) {real:.4f}, D(G(z)) "
                f"{fake:.4f}) and hardly learns any more: lower --lr-g or raise --lr-d, with "
                f"--beta1 at most 0.5; {OLDER}"
            )
        return None

    def _shares(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """What D and G learn from an image at the most, 0 to 1: the derivatives of their losses by
        their logits (by D's output, of least squares).
        """
        loss, s = self._objective.loss, self._objective.label_smoothing
        real, fake = row["d_real"], row["d_fake"]
        if loss == "hinge":  # beyond both margins D's loss is 0; G's derivative never is
            return row["d_loss"], 1.0
        return max(1 - s - real, fake), fake if loss == "minimax" else 1 - fake

    def samples(self, images: ArrayLike, kimg: float) -> tuple[float, str | None]:
        """A grid, uint8 [N, H, W, 3] on the CPU, of the same latents each time: its `diversity` as
        a part of that of real images, and a warning, or None.

        The diversity is NaN where there is none to tell: of one image, and where all real ones are
        the same.
        """
        fake = _checked(images)
        if fake.shape[1:] != self._real.shape[1:]:
            raise ValueError(
                f"Watch: images must be {list(self._real.shape[1:])} as the real ones are, got "
                f"{list(fake.shape[1:])}"
            )
        count = min(len(fake), len(self._real), MOST)
        if count < 2:
            return math.nan, None
        if count not in self._of_real:
            self._of_real[count] = diversity(_spread(self._real, count))
        if not self._of_real[count]:
            return math.nan, None
        value = diversity(_spread(fake, count)) / self._of_real[count]
        return value, self._judge(value, kimg) if count >= FEWEST else None

    def _judge(self, value: float, kimg: float) -> str | None:
        step, best = self._last["step"], self._best
        fall = FALLEN * best if best >= FALL_FROM else 0.0
        limit = max(fall, ALIKE if step >= ALIKE_STEPS else 0.0)
        alike = self._alike.see(value < limit, value > RISEN * limit, kimg, step, step)
        # noise may be more diverse than real images are: to lose that is no fall
        if min(value, 1.0) > best:
            self._best, self._best_kimg = min(value, 1.0), kimg
        if not alike:
            return None
        if value < fall:
            what = (
                f"the samples have become alike since {self._alike.kimg:g} kimg: they are "
                f"{value:.2f} as diverse as real images, and were {best:.2f} at "
                f"{self._best_kimg:g} kimg"
            )
        else:
            what = (
                f"the samples are alike still at {kimg:g} kimg, after {step:,} steps: they are "
                f"{value:.2f} as diverse as real images"
            )
        return f"{what}; {self._what_to_do()}; {OLDER}"

    def _what_to_do(self) -> str:
        """By who was ahead at the last tick."""
        real, fake = self._last["d_real"], self._last["d_fake"]
        now = f"D(x) {real:.2f}, D(G(z)) {fake:.2f}"
        if self._objective.loss == "hinge":  # of which these are no probabilities
            return "lower --lr-g and --lr-d, or raise --batch, with --beta1 at most 0.5"
        if real - fake > D_AHEAD * (1 - self._objective.label_smoothing):
            return f"D is far ahead ({now}): lower --lr-d or raise --lr-g, with --beta1 at most 0.5"
        if real - fake < G_AHEAD:
            return (
                f"G is ahead of D ({now}): lower --lr-g or raise --lr-d, with --beta1 at most 0.5"
            )
        return f"lower --lr-g and --lr-d, or raise --batch, with --beta1 at most 0.5 ({now})"


class _Episode:
    """What holds so many times in a row, over so many steps, and is told once.

    Attributes:
        kimg: since when it holds.
    """

    def __init__(self, times: int, steps: int) -> None:
        self.kimg = 0.0
        self._least = (times, steps)
        self._times, self._first_step, self._told = 0, 0, False

    def see(self, holds: bool, over: bool, kimg: float, first_step: int, step: int) -> bool:
        """Whether it is to be told now; `over` allows it to be told again. What is seen reaches
        from `kimg` and `first_step` to `step`.
        """
        if over:
            self._told = False
        if not holds:
            self._times = 0
            return False
        if not self._times:
            self.kimg, self._first_step = kimg, first_step
        self._times += 1
        times, steps = self._least
        lasts = self._times >= times and step - self._first_step >= steps
        tell = lasts and not self._told
        self._told |= lasts
        return tell


def _checked(images: ArrayLike) -> np.ndarray:
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"Watch: images must be uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}"
        )
    return array


def _spread(images: np.ndarray, count: int) -> np.ndarray:
    """`count` of the images, evenly over all of them."""
    return images[np.linspace(0, len(images) - 1, count).astype(np.int64)]


def _small(images: np.ndarray) -> np.ndarray:
    """float32 [N, values]: the means of squares of pixels, as many as leave EDGE a side or more."""
    n, height, width, _ = images.shape
    by = max(1, min(height, width) // EDGE)
    h, w = height // by, width // by
    tiles = images[:, : h * by, : w * by].reshape(n, h, by, w, by, 3)
    return tiles.mean((2, 4), dtype=np.float32).reshape(n, -1)
