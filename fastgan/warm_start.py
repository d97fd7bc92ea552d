"""`--init-g` and `--init-d`: a new run that begins with somebody's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .config import FIXED, NetworkOptions, TrainConfig, flag_of
from .console import warn
from .errors import RunError, UsageError
from .layouts import read_discriminator, read_generator
from .optim import copy_into
from .state import State

# What a file's shapes tell of each network, and a generator's file of its last activation.
TOLD = {
    "init_g": ("arch", "size", "latent", "width", "pixel_range"),
    "init_d": ("arch", "size", "width", "spectral_norm"),
}
KIND = {"init_g": "generator", "init_d": "discriminator"}

FirstWeights = dict[str, dict[str, Tensor]]  # by "init_g" and "init_d"


def first_weights(config: TrainConfig) -> FirstWeights:
    """The tensors that the configuration names, by our names, float32 on the CPU.

    Raises:
        UsageError: they are of another network than the run's, or there is no such file.
        RunError: they cannot be read.
    """
    found: FirstWeights = {}
    for key in TOLD:
        if (path := getattr(config, key)) is None:
            continue
        try:
            found[key], theirs = (read_generator if key == "init_g" else read_discriminator)(path)
        except (UsageError, RunError) as error:
            raise type(error)(f"{flag_of(key)}: {error}") from None
        _check_same(config, theirs, key, path)
    return found


def warm_start(state: State, first: FirstWeights) -> None:
    """Put these weights, which rank 0 has, in place of those that were drawn; the average begins
    with the generator's.
    """
    config, ranks = state.config, state.ranks
    if config.init_g is None and config.init_d is None:
        return
    networks: dict[str, list[Any]] = {"init_d": [state.d], "init_g": [state.g, state.ema]}
    for key, weights in first.items():
        for each in networks[key]:
            copy_into(each.network.state_dict(), weights, flag_of(key))
    ranks.broadcast_(state.tensors())
    for side in (state.g, state.d):
        side.adam.write_low()


def _check_same(ours: NetworkOptions, theirs: NetworkOptions, key: str, path: Path) -> None:
    """`UsageError` where weights are of another network than the run's: both are named."""
    names = TOLD[key]
    if key == "init_g" and theirs.latent_dist != ours.latent_dist:
        if theirs.latent_dist != "normal":
            names = (*names, "latent_dist")
        else:  # which a file without a record passes for
            warn(
                f"{flag_of(key)} {path} is of normal latents, or does not say of which; this run "
                "draws uniform ones"
            )
    held, wanted = ({name: getattr(of, name) for name in names} for of in (theirs, ours))
    if key == "init_d" and {theirs.arch, ours.arch} <= set(FIXED):
        held["arch"] = wanted["arch"]  # both of these have the same D
    different = [name for name in held if held[name] != wanted[name]]
    if not different:
        return
    was, now = (
        ", ".join(f"{name} {values[name]}" for name in different) for values in (held, wanted)
    )
    raise UsageError(
        f"{flag_of(key)} {path} is a {KIND[key]} of {was}, and the run's has {now}: give the flags "
        "that fit the weights"
    )
