"""`--init-g` and `--init-d`: a new run that begins with somebody's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import FIXED, NetworkOptions, flag_of
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


def warm_start(state: State) -> None:
    """Put the weights that the run's configuration names in place of those that were drawn; the
    average begins with the generator's.

    Raises:
        UsageError: they are of another network than the run's.
        RunError: they cannot be read.
    """
    named = {key: path for key in TOLD if (path := getattr(state.config, key)) is not None}
    if not named:
        return
    ranks = state.ranks
    with ranks.together():
        for key, path in named.items() if ranks.first else ():
            _put(state, key, path)
    ranks.broadcast_(state.tensors())
    for side in (state.g, state.d):
        side.adam.write_low()


def _put(state: State, key: str, path: Path) -> None:
    read = read_generator if key == "init_g" else read_discriminator
    weights, theirs = read(path)
    _check_same(state.config, theirs, key, path)
    networks: tuple[Any, ...] = (state.d.network,)
    if key == "init_g":
        networks = (state.g.network, state.ema.network)
    try:
        for network in networks:
            copy_into(network.state_dict(), weights, f"{flag_of(key)} {path}")
    except ValueError as error:
        raise RunError(str(error)) from None


def _check_same(ours: NetworkOptions, theirs: NetworkOptions, key: str, path: Path) -> None:
    """`UsageError` where weights are of another network than the run's: both are named."""
    held, wanted = ({name: getattr(of, name) for name in TOLD[key]} for of in (theirs, ours))
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
