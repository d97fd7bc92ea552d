"""`fastgan.train`: a run from Python."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .config import DEFAULT_RECIPE, TrainConfig, explain, lengths_replaced, load_recipe
from .errors import UsageError
from .resume import load_config
from .trainer import train as run


def train(
    config: TrainConfig | None = None,
    *,
    recipe: str | Path | None = None,
    resume: str | Path | None = None,
    allow_change: Collection[str] = (),
    elastic: bool = False,
    **options: Any,
) -> Path:
    """Train as `fastgan train` does, and return the run's folder.

        run = fastgan.train(data="photos", size=64, kimg=500)
        run = fastgan.train(recipe="quickstart", kimg=20)
        run = fastgan.train(resume=run, kimg=1000)

    Under torchrun each process calls it, and each gets the folder.

    Args:
        config: a configuration, which the options are laid over; without one it is the recipe's,
            the resumed run's, or else the defaults: with no `data` either, the recipe quickstart.
        recipe: a name, or a TOML file as `fastgan train --dry-run` prints it.
        resume: a run folder or a checkpoint in one, to go on with; or "auto".
        allow_change, elastic: as the command's flags.
        options: the command's other flags by their names, which are the fields of `TrainConfig`.

    Raises:
        UsageError: an option does not fit; the message names it.
        RunError: something is damaged, memory ran out, or the training did not stay finite.
        KeyboardInterrupt: Ctrl-C ended it, after a save.
        SystemExit: SIGTERM, SIGUSR1 or SIGHUP did; its code is 128 and the signal.
    """
    if not isinstance(config, TrainConfig | None):
        raise UsageError(f"train: config must be a TrainConfig, got {type(config).__name__}")
    if resume is None and (allow_change or elastic):
        raise UsageError(
            "train: allow_change and elastic need resume: a new run has nothing to keep"
        )
    if isinstance(allow_change, str):
        allow_change = (allow_change,)
    if "eval_every" in options:  # as the flag may be spelled
        options["eval_kimg"] = options.pop("eval_every")
    base = config if config is not None else _base(options, recipe, resume)
    if config is not None and recipe is not None:
        raise UsageError("train: config and recipe are two configurations: give one of them")
    made = _laid_over(base, options)
    folder: list[Path] = []
    code = run(
        made,
        resume=None if resume is None else str(resume),
        allow_change=allow_change,
        elastic=elastic,
        began=folder.append,
    )
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return folder[-1]


def _base(
    options: dict[str, Any], recipe: str | Path | None, resume: str | Path | None
) -> TrainConfig:
    """What options are laid over where no configuration is given, as on the command line."""
    if resume is not None and str(resume) != "auto":
        given = [name for name in ("recipe", "out") if {"recipe": recipe, **options}.get(name)]
        if given:
            raise UsageError(f"train: {given[0]} does not go with resume: the run has one")
        return load_config(Path(resume))
    if recipe is not None:
        return load_recipe(str(recipe))
    return load_recipe(DEFAULT_RECIPE) if "data" not in options else TrainConfig()


def _laid_over(base: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """The configuration with some options replaced; `UsageError` names what does not fit."""
    for name in options:
        if name not in TrainConfig.model_fields:
            near = difflib.get_close_matches(name, TrainConfig.model_fields, n=2)
            guess = f"did you mean {' or '.join(near)}?" if near else "see fastgan train --help"
            raise UsageError(f"train: unknown option {name!r}; {guess}")
    values = lengths_replaced(base, options).model_dump() | options
    if isinstance(values["data"], Path):
        values["data"] = str(values["data"])
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise UsageError(explain(error, "train: ", dash=False)) from None
