"""`--resume`: which run is meant, and whether it may go on with the configuration at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import console
from .checkpoint import checkpoints
from .config import TrainConfig, config_from, differences, flag_of
from .errors import RunError, UsageError
from .runlog import run_number

# What `--resume auto` does not look at: the same command on another machine, longer, or elsewhere,
# and by which code the same numbers are computed.
FREE = {"kimg", "epochs", "device", "out", "cache", "tick_kimg", "sample_kimg", "save_kimg"}
FREE |= {"keep_checkpoints", "kernels", "compile", "graph", "loader", "decoder", "on_bad"}
# A run goes on with these as they were: they shape the networks, or what was counted in steps.
FIXED = ("size", "batch", "latent", "width", "pixel_range", "seed")


def run_to_resume(config: TrainConfig, resume: str | None) -> Path | None:
    """The run, or the checkpoint in it, that `resume` means for `config`; None starts anew.

    Raises:
        UsageError: there is no such run, or it cannot go on with this configuration.
    """
    if resume is None:
        return None
    if resume == "auto":
        found = _latest_like(config)
        if found is None:
            console.say(
                f"--resume auto: no run of this configuration with a checkpoint in {config.out}, "
                "starting one"
            )
        return found
    path = Path(resume)
    run = run_of(path)
    changed = differences(load_config(path), config)
    changed.pop("out", None)  # the run stays where it is, wherever that was when it began
    for key in FIXED:
        if key in changed:
            was, now = changed[key]
            raise UsageError(
                f"{flag_of(key)} cannot change within a run: {run} has {was}, got {now}"
            )
    for key, (was, now) in changed.items():
        console.say(f"{key}: {was} -> {now}")
    return path


def run_of(path: Path) -> Path:
    """The run folder that a run or one of its checkpoints belongs to."""
    path = Path(os.path.abspath(path))
    around = [path, *path.parents][:4]  # a checkpoint lies two below its run; one set aside, three
    return next((p for p in around if os.path.isfile(p / "config.json")), path)


def load_config(path: Path) -> TrainConfig:
    """The configuration of the run that `--resume` names by its folder or a checkpoint."""
    run = run_of(path)
    config = run / "config.json"
    if not os.path.isfile(config) or os.path.isfile(path):
        what = "does not exist"
        if os.path.exists(path):
            what = "holds no run (no config.json)" if os.path.isdir(path) else "is a file"
        raise UsageError(
            f"--resume must be auto, a run folder or one of its checkpoints: {path} {what}"
        )
    try:
        values = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{config} cannot be read: {error}") from None
    return config_from(values, f"{config}: ")


def _latest_like(config: TrainConfig) -> Path | None:
    """The newest run under `config.out` of the same configuration that has a checkpoint."""
    if not os.path.isdir(config.out):
        return None
    nearest: tuple[Path, set[str]] | None = None
    for path in sorted(config.out.iterdir(), key=run_number, reverse=True):
        if run_number(path) < 0:
            continue
        try:
            theirs = load_config(path)
        except (UsageError, RunError):  # of another version: not this configuration
            continue
        if others := set(differences(theirs, config)) - FREE:
            if nearest is None or len(others) < len(nearest[1]):
                nearest = path, others
            continue
        if checkpoints(path):
            return path
        console.say(f"--resume auto: {path} has no checkpoint, looking further")
    if nearest is not None:
        flags = ", ".join(map(flag_of, sorted(nearest[1])))
        console.say(f"--resume auto: {nearest[0]} is nearest, but for {flags}")
    return None
