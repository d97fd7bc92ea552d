"""`fastgan evaluate`: metrics of a generator's images beside what they mean, which are those of
real images, of an untrained generator and of noise.

The real images, but for those held out, are cut in two by the seed: every set is compared with the
first half, the second half too, which is the floor. SWD needs as many images of each set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..commands import EvaluateCommand
from ..console import bar, clock, say
from ..data.cache import Cache
from ..env import environment
from ..errors import RunError, is_out_of_memory
from ..generators import options_of
from ..models import Generator
from ..samples import save_picture
from . import inception
from .baselines import Known
from .nearest import KEPT, picture
from .plan import Plan, Sets
from .records import append, mark
from .rows import (
    FORMS,
    LABELS,
    SAMPLES,
    Critic,
    Judge,
    Made,
    Row,
    Shown,
    Work,
    cost_of,
    noise,
    untrained,
)
from .sources import Progress, Source, Trained
from .table import tables

# what noise and the like are measured by
BASELINE = ("swd", "swd_mmagic", "ms_ssim", "c2st", "inception")
LEGEND = {
    "swd": "SWD x 1e3: lower is nearer to real images, and the first row is the floor",
    "swd_mmagic": "SWD (mmagic's form) x 1e3: of another pyramid, for numbers that are given in it",
    "ms_ssim": "MS-SSIM: higher is less diverse; to be near the first row's",
    "c2st": "C2ST: how often a network tells them from real images; of 50% it cannot",
    "nearest": "nearest: distance to the nearest training image over that to the second; far "
    "below 1 are copies",
}


def evaluate(what: str | Path, **options: Any) -> dict[str, Any]:
    """Measure a generator's images as `fastgan evaluate` does, and return the record that it
    writes.

    Args:
        what: a run, a checkpoint, weights, or a folder, zip or cache of images.
        options: the command's flags by their names: data, against (several), count, metrics,
            inception, size, crop, filter, holdout, seed, ema, device, out.

    Raises:
        UsageError: an argument, which the message names as its flag, does not fit.
        RunError: something is damaged, or memory ran out.
    """
    if options.get("data") is not None:
        options["data"] = str(options["data"])
    against = tuple(str(other) for other in options.pop("against", ()))
    return run(EvaluateCommand(what=str(what), against=against, **options))


def run(command: EvaluateCommand) -> dict[str, Any]:
    """`evaluate`, for the command line."""
    return evaluate_by(command)[0]


def evaluate_by(
    command: EvaluateCommand,
    real: Cache | None = None,
    showing: Callable[[float], Shown] | None = None,
) -> tuple[dict[str, Any], str]:
    """The record, and in words what it says of the run's best checkpoint ("": nothing).

    Args:
        real: the real images, where they are open already: those that `command` names.
        showing: takes the seconds that it may last, and gives what is told how far it is, in place
            of a bar of its own. What that raises ends the evaluation, and nothing is written.
    """
    try:
        return _evaluate(command, real, showing)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if isinstance(error, torch.OutOfMemoryError):  # what is computed at a time never grows
            raise RunError(
                "the GPU has no room left to evaluate; fastgan evaluate --device cpu needs none"
            ) from None
        raise RunError(
            f"--count {command.count:,} takes more memory than there is: give fewer"
        ) from None


def _evaluate(
    command: EvaluateCommand, real: Cache | None, showing: Callable[[float], Shown] | None
) -> tuple[dict[str, Any], str]:
    began = time.perf_counter()
    plan = Plan(command)
    sets = Sets(plan, real)
    cache, count, seed = sets.cache, sets.count, command.seed
    order = np.random.default_rng([seed, 0]).permutation(len(cache.images))
    judge = Judge(
        cache.images[np.sort(order[:count])],
        cache.images,
        cache.held_out[:count] if sets.held_out else None,
        Known(plan.root / "metrics", sets.about()),
        inception.Inception(plan.weights, plan.device) if plan.weights else None,
        seed,
        plan.device,
    )
    rows = _rows(plan, sets, np.sort(order[count : 2 * count]))
    for row in rows:
        judge.recall(row)
    with ExitStack() as stack:
        cost = _cost(rows, plan, count)
        shown = showing(cost) if showing else stack.enter_context(bar("evaluating", cost, "s"))
        work = Work(shown)
        for row in rows:
            images = judge.measure(row, work)
            if row.role == "model" and images is not None:
                _of_model(plan, row, images, judge, cache, work)
            images = None  # before the next row's are made
    record = _record(plan, sets, rows, work.seconds)
    try:
        append(plan.out, record)
    except OSError as error:
        raise RunError(f"{plan.out} cannot be written: {error.strerror or error}") from None
    _tell(plan, rows)
    best = ""
    if plan.run is not None and command.out is None and sets.own:
        assert isinstance(plan.what, Trained)
        best = mark(plan.run, plan.what.path, record)
    if best:
        say(f"best       {best}")
    say(f"record     a line in {plan.out}")
    took = sorted(work.seconds.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{LABELS[kind]} {clock(s)}" for kind, s in took if s >= 0.5)
    say(f"took       {clock(time.perf_counter() - began)}{': ' * bool(parts)}{parts}")
    return record, best


def _rows(plan: Plan, sets: Sets, other_half: np.ndarray) -> list[Row]:
    seed, count, images = plan.command.seed, sets.count, sets.cache.images
    size = sets.cache.meta.size
    like = plan.what.generator if isinstance(plan.what, Trained) else Generator(size)
    shape = "-".join(map(str, options_of(like).model_dump().values()))
    basic = [metric for metric in BASELINE if metric in plan.metrics]
    mine = [metric for metric in plan.metrics if metric != "d_accuracy"]
    if len(images) < KEPT and "nearest" in mine:
        mine.remove("nearest")

    def of_untrained(progress: Progress) -> np.ndarray:
        new = Trained("untrained", Path(), untrained(like, seed, plan.device), "")
        return new.images(count, seed, progress)

    rows = [Row("real", "real, the other half", lambda _: images[other_half], basic, "real")]
    for number, (source, pictures) in enumerate(sets.sets):
        make = _maker(source, pictures, count, seed)
        rows.append(Row("against" if number else "model", source.name, make, mine))
    name = "untrained generator"
    rows.append(Row("untrained", name, of_untrained, basic, f"untrained {shape}"))
    every = (count, size, size, 3)
    rows.append(Row("noise", "noise", lambda _: noise(every, seed), basic, "noise"))
    return rows


def _maker(source: Source, pictures: Cache | None, count: int, seed: int) -> Made:
    """What makes the images of a source, or draws as many of them."""
    if isinstance(source, Trained):
        return lambda progress: source.images(count, seed, progress)
    assert pictures is not None
    held = pictures.images
    order = np.random.default_rng([seed, 2]).permutation(len(held))
    return lambda _: held[np.sort(order[:count])]


def _cost(rows: Sequence[Row], plan: Plan, count: int) -> float:
    """Seconds that all of it may take, for the bar."""
    jobs = [job for row in rows if row.missing for job in ("images", *row.missing)]
    jobs += [metric for metric in (*FORMS, "d_accuracy") if metric in plan.metrics]
    return sum(cost_of(job, count) for job in jobs)


def _of_model(
    plan: Plan, row: Row, images: np.ndarray, judge: Judge, cache: Cache, work: Work
) -> None:
    """What is measured of it alone: its D, and the picture of its nearest neighbours."""
    what = plan.what
    if "d_accuracy" in plan.metrics:
        assert isinstance(what, Trained) and what.checkpoint and what.config
        with work.doing("d_accuracy", len(images), row.name):
            critic = Critic(what.checkpoint, what.config, plan.device)
            row.results["d_accuracy"] = critic.accuracy(judge.real, cache.held_out, images)
    if row.neighbours is not None:
        shown = picture(images[:SAMPLES], cache.images, row.neighbours)
        try:
            save_picture(shown, plan.picture, shared=True)
        except OSError as error:
            raise RunError(f"{plan.picture} cannot be written: {error.strerror or error}") from None
        row.results["nearest"] |= {"picture": plan.picture.name}


def _tell(plan: Plan, rows: Sequence[Row]) -> None:
    """The table, and what is said of the model alone."""
    legend = [text for metric, text in LEGEND.items() if metric in plan.metrics]
    for line in ["", *tables([(row.name, row.results) for row in rows]), "", *legend]:
        say(line)
    model = next(row.results for row in rows if row.role == "model")
    if told := model.get("d_accuracy"):
        kinds = {"real": "real", "held_out": "held-out real", "fake": "generated"}
        shares = [f"{told[key]:.0%} of {v}" for key, v in kinds.items() if told[key] is not None]
        say(f"D          tells rightly {', '.join(shares)} images")
    if "nearest" in model:
        say(f"nearest    {plan.picture}: samples, and right of each its nearest training images")


def _record(
    plan: Plan, sets: Sets, rows: Sequence[Row], seconds: dict[str, float]
) -> dict[str, Any]:
    """All of it as JSON values."""
    what, cache = plan.what, sets.cache
    trained = what if isinstance(what, Trained) else None
    found = trained.checkpoint if trained else None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "what": what.name,
        "path": str(what.path) if isinstance(what, Trained) else what.source,
        "checkpoint": found.path.name if found else None,
        "images_seen": found.meta["images"] if found else None,
        "ema": plan.command.ema if found else None,
        "weights_sha256": trained.digest if trained else None,
        "count": sets.count,
        "seed": plan.command.seed,
        "data": {
            "source": plan.source,
            "identity": cache.identity,
            "images": len(cache.images),
            "held_out": len(cache.held_out),
            **cache.meta.options,
        },
        "rows": [{"set": row.name, "role": row.role, **row.results} for row in rows],
        "seconds": {kind: round(s, 2) for kind, s in seconds.items()},
        "environment": environment(plan.device),
    }
