"""`--resume`: which run is meant, and whether it may go on with the configuration at hand.

A run is gone on with from a checkpoint, and what has changed is what differs from the configuration
that the checkpoint was written with. `CHANGES` says for each option what a change of it means.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from . import console
from .checkpoint import META, checkpoints, newest_by_looks
from .config import TrainConfig, differences, flag_of, recorded_config
from .errors import RunError, UsageError
from .formats import upgraded_config
from .runlog import held_by, run_number


class Change(Enum):
    """What a changed option means for a run that goes on."""

    NEVER = "refused: it is what the networks are"
    NAMED = "refused unless --allow-change names it: it is part of what the run is"
    TOLD = "told: it changes what is computed from here on"
    CODE = "told, and nothing to --resume auto: the same is computed elsewhere, or by other code"
    FREE = "nothing: how long, how often, where to, and from where the same images come"


# What the images and their order depend on: a checkpoint's `data.identity` covers all of these.
SET = ("data", "crop", "filter", "min_size", "max_pixels", "limit", "keep", "holdout")
CHANGES: dict[Change, tuple[str, ...]] = {
    # pixel_range: the generator's last activation is made for it
    # latent_dist: so is its whole training. init_g, init_d: what it came from
    Change.NEVER: (
        *("arch", "size", "latent", "latent_dist", "width", "pixel_range", "spectral_norm"),
        *("init_g", "init_d"),
    ),
    # batch: a run counts in steps. seed: it orders the images and draws the samples' latents.
    Change.NAMED: (*SET, "batch", "seed"),
    # All of these are read anew at each start, and the checkpoint has the same tensors for any of
    # them: weights are float32 with --amp, too, and of fp16's scale only the number is lost.
    Change.TOLD: (
        *("lr_g", "lr_d", "beta1", "beta2", "ema_kimg", "flip"),
        *("loss", "label_smoothing", "instance_noise", "noise_kimg", "diffaug", "r1", "r1_every"),
        *("amp", "amp_dtype", "sync_bn"),
    ),
    Change.CODE: ("device", "kernels", "compile", "graph"),
    # loader, decoder, on_bad: every way gives the same images in the same order, or another count,
    # which is checked where the set is opened. grid: image i is of the same latents in any grid.
    Change.FREE: (
        *("kimg", "epochs", "out", "cache", "loader", "decoder", "on_bad", "grid"),
        *("tick_kimg", "tick_epochs", "sample_kimg", "save_kimg", "keep_checkpoints", "logger"),
        *("eval_kimg", "eval_count", "eval_metrics"),
    ),
}
CHANGE_OF = {key: change for change, keys in CHANGES.items() for key in keys}
# No part of what a run is: `--resume auto` does not look at them, and with an earlier checkpoint it
# is the latest of them that counts.
PASSING = {*CHANGES[Change.CODE], *CHANGES[Change.FREE]}
# A path is a name for images, and a set may be staged elsewhere or be decoded by now: that they are
# the same is checked by their identity, once the set is open.
BY_CONTENTS = {"data"}


def run_to_resume(
    config: TrainConfig, resume: str | None, allow_change: Iterable[str] = ()
) -> Path | None:
    """The run, or the checkpoint in it, that `resume` means for `config`; None starts anew.

    Args:
        allow_change: options that may differ though they are part of what the run is.

    Raises:
        UsageError: there is no such run, or it cannot go on with this configuration.
        RunError: it was written by a newer fastgan, or its config.json is damaged.
    """
    allowed = allowed_changes(allow_change)
    if resume is None:
        return None
    path = _latest_like(config, allowed) if resume == "auto" else Path(resume)
    if path is None:
        console.say(
            f"--resume auto: no run of this configuration with a checkpoint in {config.out}, "
            "starting one"
        )
        return None
    _run_config(path)  # that there is a run at all comes before what is in it
    start, meta = _newest_record(path)
    check_changes(config, start, meta, allowed)  # before anything is decoded
    return path


def allowed_changes(names: Iterable[str]) -> frozenset[str]:
    """The options that `--allow-change` names, as keys: `lr_g` for lr_g, lr-g and --lr-g.

    Raises:
        UsageError: there is no such option, or it can never change.
    """
    keys = set()
    for name in names:
        key = name.removeprefix("--").replace("-", "_")
        if key not in CHANGE_OF:
            near = difflib.get_close_matches(key, CHANGE_OF, n=3)
            guess = f"did you mean {' or '.join(near)}?" if near else "see fastgan train --help"
            raise UsageError(f"--allow-change must name an option of a run, got {name!r}; {guess}")
        if CHANGE_OF[key] is Change.NEVER:
            raise UsageError(
                f"--allow-change {name}: {flag_of(key)} cannot change, since a run's networks keep "
                "what they are: start a new run"
            )
        keys.add(key)
    return frozenset(keys)


def check_changes(
    config: TrainConfig, start: Path, meta: Mapping[str, Any] | None, allowed: Iterable[str] = ()
) -> list[str]:
    """What changes when the checkpoint `start` goes on with `config`, in lines for the screen.

    Args:
        start: a checkpoint in its run, or a run that has none.
        meta: the checkpoint's record; None for a run that has none, of which config.json counts.
        allowed: the keys that `--allow-change` names.

    Raises:
        UsageError: something changes that may not; every such option is named, with both values.
    """
    run, latest = run_of(start), _run_config(start)
    then = latest if meta is None else _config_of(start, meta)
    since = differences(latest, then)
    changed = differences(then, config)
    errors, lines = [], []
    for key in TrainConfig.model_fields:
        change = CHANGE_OF[key]
        if change is Change.FREE:
            continue
        if key not in changed:
            if key in since and change is not Change.CODE:  # back to how it was then
                was, now = map(_shown, since[key])
                lines.append(f"{key}: {was} -> {now}, as {start.name} was written")
            continue
        was, now = map(_shown, changed[key])
        where = start if key in since else run
        if change is Change.NEVER:
            errors.append(
                f"{flag_of(key)} cannot change within a run: {where} has {was}, got {now}; a run's "
                "networks stay what they are: start a new run"
            )
        elif change is Change.NAMED and key not in {*allowed, *BY_CONTENTS}:
            errors.append(
                f"{flag_of(key)} is part of what a run is: {where} has {was}, got {now}; "
                f"--allow-change {key} goes on with {now}"
            )
        else:
            lines.append(f"{key}: {was} -> {now}")
    if errors:
        raise UsageError("\n".join(errors))
    return [f"{'changed':<10} {line}" for line in lines]


def _shown(value: Any) -> str:
    """A value as the command line takes it, or nearly."""
    if value is None:
        return "not set"
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_of(path: Path) -> Path:
    """The run folder that a run or one of its checkpoints belongs to."""
    path = Path(os.path.abspath(path))
    for place in (path, Path(os.path.realpath(path))):  # a link to a checkpoint leads to its run
        around = [place, *place.parents][:4]  # it lies two below its run; one set aside, three
        if found := next((p for p in around if os.path.isfile(p / "config.json")), None):
            return found
    return path


def load_config(path: Path) -> TrainConfig:
    """The configuration that `--resume` goes on with where no flag says otherwise.

    Of a run it is its config.json: what the last command asked for, also when that was killed
    before its first checkpoint. A checkpoint that is named goes on as it was, whatever the run did
    after it; only what is no part of the run (`PASSING`) is the run's latest.
    """
    latest = _run_config(path)
    meta = None if run_of(path) == Path(os.path.abspath(path)) else _record(path)
    if meta is None:
        return latest
    passing = {key: getattr(latest, key) for key in PASSING}
    return _config_of(path, meta).model_copy(update=passing)


def _run_config(path: Path) -> TrainConfig:
    """config.json of the run that `--resume` names by its folder or a checkpoint."""
    run = run_of(path)
    config = run / "config.json"
    try:
        there = stat.S_ISREG(os.stat(config).st_mode)
    except PermissionError as error:
        raise RunError(f"{config} cannot be read: {error.strerror}") from None
    except OSError:
        there = False
    if not there or os.path.isfile(path):
        what = "does not exist"
        if os.path.exists(path):
            what = "holds no run (no config.json)" if os.path.isdir(path) else "is a file"
        raise UsageError(
            f"--resume must be auto, a run folder or one of its checkpoints: {path} {what}"
        )
    try:
        values = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{config} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise RunError(f"{config} is damaged: it must hold a table of options")
    environment = _json_table(run / "env.json") or {}
    return recorded_config(upgraded_config(values), f"{config}: ", environment.get("fastgan"))


def _config_of(start: Path, meta: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a checkpoint was written with."""
    values = upgraded_config(meta["config"])
    return recorded_config(values, f"checkpoint {start}: ", meta.get("fastgan"))


def _newest_record(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint that `path` names, or the newest of a run that looks whole, and its record.

    A run without one, or a checkpoint whose record cannot be read, comes back without.
    """
    run, path = run_of(path), Path(os.path.abspath(path))
    if path == run:
        path = newest_by_looks(run) or run
    return path, None if path == run else _record(path)


def _record(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's record; None where it cannot be read: who opens the checkpoint says why."""
    meta = _json_table(checkpoint / META)
    return meta if meta is not None and isinstance(meta.get("config"), dict) else None


def _json_table(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _latest_like(config: TrainConfig, allowed: Iterable[str]) -> Path | None:
    """The newest run under `config.out` of the same configuration that has a checkpoint; what is
    `allowed` to change may differ.
    """
    if not os.path.isdir(config.out):
        return None
    try:
        places = sorted(config.out.iterdir(), key=run_number, reverse=True)
    except OSError as error:
        raise UsageError(f"--out {config.out} cannot be read: {error.strerror}") from None
    nearest: tuple[Path, set[str]] | None = None
    for path in places:
        if run_number(path) < 0:
            continue
        try:
            theirs = _run_config(path)
        except UsageError:  # no run, or of an older version: not this configuration
            continue
        except RunError as error:  # it may be the one that is meant
            console.warn(f"--resume auto passes over a run: {error}")
            continue
        if others := set(differences(theirs, config)) - PASSING - {*allowed}:
            if nearest is None or len(others) < len(nearest[1]):
                nearest = path, others
            continue
        if holder := held_by(path):
            raise RunError(
                f"{path} is the same run, and in use by {holder}: wait for it or stop it"
            )
        if checkpoints(path):
            return path
        console.say(f"--resume auto: {path} has no checkpoint, looking further")
    if nearest is not None:
        flags = ", ".join(map(flag_of, sorted(nearest[1])))
        line = f"--resume auto: {nearest[0]} is nearest, but for {flags}"
        if not nearest[1] & {*CHANGES[Change.NEVER]}:
            line += "; to go on with it, name them by --allow-change"
        console.say(line)
    return None
