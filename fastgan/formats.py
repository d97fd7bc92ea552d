"""What older checkpoints and runs hold, brought to the newest form: one step for each version.

    1   meta.json: `scaler`, torch.amp.GradScaler's state ({} without float16); state.safetensors:
        `stats.sums` [4] and `stats.count`. The first ones named no device.
    2   `loss_scale.scale` and `loss_scale.good_steps` (float16 only); `stats.sums` [5], the count
        being the last. (The earliest of these say version 1.)
    3   meta.json: `world`, the number of processes; state.safetensors: `loss_scale.skipped`, the
        steps that float16 skipped, and `stats.recent` [50, 5], the last steps' statistics, a ring
        into which `stats.steps` have gone.

Configurations changed between versions, and are told by what they hold. One without `crop` is from
before images could be framed in other ways than one, and its `keep` is now `keep_checkpoints`; the
images' identity was another digest then, which cannot be compared, and becomes None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import RunError

VERSION = 3
RECENT_SHAPE = (50, 5)  # of stats.recent, in version 3
CPU_RANDOM_BYTES = 5056  # of a CPU generator's state; a GPU's has 16

Meta = dict[str, Any]
State = dict[str, Tensor]


def upgraded(
    meta: Mapping[str, Any], where: str, state: Mapping[str, Tensor] | None = None
) -> tuple[Meta, State]:
    """A checkpoint's record and the tensors of its state.safetensors in the newest form; the other
    files have not changed.

    Args:
        meta: meta.json as it was read; it is left as it is.
        where: the checkpoint, as messages name it.
        state: as it was read; None where the record alone is wanted.

    Raises:
        RunError: the version is none that this fastgan knows, or what changed is damaged.
    """
    version = meta.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RunError(f"checkpoint {where} is damaged: meta.json has no right format_version")
    if version > VERSION:
        raise RunError(
            f"checkpoint {where} has format {version}, this fastgan reads 1 to {VERSION}: it was "
            "written by a newer version of fastgan; update fastgan"
        )
    newest, tensors = dict(meta), dict(state or {})
    try:
        for step in STEPS[version - 1 :]:
            newest, tensors = step(newest, tensors)
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise RunError(
            f"checkpoint {where} is damaged: {_line(error)} in format {version}"
        ) from None
    return {**newest, "format_version": VERSION}, tensors


def upgraded_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as config.json or a checkpoint keeps it, in the newest form."""
    newest = dict(values)
    # a number of checkpoints, 2 or more, which since is a probability, at most 1
    if "keep" in newest and _is_old(newest):
        newest["keep_checkpoints"] = newest.pop("keep")
    return newest


def _line(error: Exception) -> str:
    """A library's error in one line, and that of a missing key more than the key."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_old(config: Mapping[str, Any]) -> bool:
    return "crop" not in config and "keep_checkpoints" not in config


def _from_1(meta: Meta, state: State) -> tuple[Meta, State]:
    meta, state = dict(meta), dict(state)
    if "device" not in meta:
        longest = meta["files"]["state"]["bytes"] > CPU_RANDOM_BYTES
        meta["device"] = "cpu" if longest else "cuda"
    if scaler := meta.pop("scaler", None):
        state["loss_scale.scale"] = torch.tensor(float(scaler["scale"]), dtype=torch.float32)
        good_steps = int(scaler["_growth_tracker"])
        state["loss_scale.good_steps"] = torch.tensor(good_steps, dtype=torch.int32)
    if "stats.count" in state:
        count = state.pop("stats.count").reshape(1)
        state["stats.sums"] = torch.cat([state["stats.sums"], count.to(torch.float64)])
    return meta, state


def _from_2(meta: Meta, state: State) -> tuple[Meta, State]:
    meta, state = {**meta, "world": 1}, dict(state)
    config, data = meta.get("config"), meta.get("data")
    if isinstance(config, dict) and isinstance(data, dict):
        if _is_old(config):
            meta["data"] = {"identity": None, "count": data.get("count")}
        meta["config"] = upgraded_config(config)
    if "loss_scale.scale" in state:
        state["loss_scale.skipped"] = torch.zeros((), dtype=torch.int64)
    state["stats.recent"] = torch.zeros(RECENT_SHAPE, dtype=torch.float64)
    state["stats.steps"] = torch.zeros((), dtype=torch.int64)
    return meta, state


STEPS: list[Callable[[Meta, State], tuple[Meta, State]]] = [_from_1, _from_2]  # from version i + 1
