"""Checkpoints: a folder of safetensors and one JSON record, complete or absent, and checked before
it is used.

    checkpoints/000120.064kimg/
      model.safetensors   g.NAME, d.NAME, ema.NAME: parameters and buffers of the three networks
      optim.safetensors   g.NAME.exp_avg, ...: both optimizers
      state.safetensors   random.latents, ema.steps, stats.sums, loss_scale.* (fp16): what else
                          changes step by step
      meta.json           format version, counters, feed position, configuration;
                          bytes and SHA-256 of each file

The folder is written beside under another name, flushed to disk, meta.json last, then renamed; so
a kill at any moment leaves the one before it whole. Its name is the images seen, to the image, and
is never written twice. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from . import console
from .durable import flush_folder, write_flushed
from .errors import RunError, UsageError

FORMAT_VERSION = 2
PARTS = ("model", "optim", "state")
META = "meta.json"
# What meta.json holds beside the format version and the digests of the files.
RECORD = {
    "step": int,
    "images": int,
    "device": str,
    "feed": dict,
    "data": dict,
    "config": dict,
}
NAME = re.compile(r"\d{6,}\.\d{3}kimg")


def kimg_name(images: int) -> str:
    """Images as a name: 120064 is `000120.064kimg`."""
    return f"{images // 1000:06d}.{images % 1000:03d}kimg"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written."""

    path: Path
    meta: dict[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of "model", "optim" or "state" by name, on the CPU."""
        return safetensors.torch.load(_checked_bytes(self.path, part, self.meta["files"]))


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def save(
    folder: Path, images: int, parts: Mapping[str, Mapping[str, Tensor]], meta: dict[str, Any]
) -> Path:
    """Write one checkpoint into `folder` and return its path.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing half-written stays.
    """
    final = folder / kimg_name(images)
    if final.exists():  # saved at this very step already
        return final
    folder.mkdir(exist_ok=True)
    # of a process that was killed: the run's lock says that it is gone
    for stale in folder.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = folder / f".{final.name}.tmp"
    scratch.mkdir()
    try:
        files = {}
        for part in PARTS:
            content = safetensors.torch.save(_apart(parts[part]))
            write_flushed(scratch / f"{part}.safetensors", content)
            files[part] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record = {"format_version": FORMAT_VERSION, "images": images, **meta, "files": files}
        write_flushed(scratch / META, (json.dumps(record, indent=1) + "\n").encode())
        flush_folder(scratch)
        os.rename(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    flush_folder(folder)
    return final


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU where one is needed, none in the memory of another: parameters may share
    one step count, and a file holds it under each name.
    """
    held: set[int] = set()
    result = {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        place = t.untyped_storage().data_ptr()
        result[name] = t.clone() if place in held else t
        held.add(place)
    return result


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file of it verified; `RunError` names the damaged file."""
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        version, files = meta["format_version"], meta["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"checkpoint {path}: {META} cannot be read ({error})") from None
    if version != FORMAT_VERSION:
        raise RunError(
            f"checkpoint {path} has format {version}, this fastgan reads {FORMAT_VERSION}: "
            "it was written by another version"
        )
    wrong = [key for key, kind in RECORD.items() if not isinstance(meta.get(key), kind)]
    if wrong:
        raise RunError(f"checkpoint {path} is damaged: {META} has no right {', '.join(wrong)}")
    for part in PARTS:
        _checked_bytes(path, part, files)
    return Checkpoint(path, meta)


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run that is whole; damaged ones are named and passed over.

    Raises:
        UsageError: the run has no checkpoint.
        RunError: it has some, and all are damaged.
    """
    paths = checkpoints(run)
    if not paths:
        raise UsageError(f"{run}: this run has no checkpoint yet")
    for path in reversed(paths):
        try:
            return open_checkpoint(path)
        except RunError as error:
            console.warn(f"{error}; trying the one before it")
    raise RunError(f"{run}: all {len(paths)} checkpoints are damaged")


def find(path: Path) -> Checkpoint:
    """The checkpoint that `path` names: a checkpoint folder, or a run folder (its newest whole
    one).
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        others = [p.name for p in checkpoints(path.parent.parent)]
        hint = f" (there are {', '.join(others)})" if NAME.fullmatch(path.name) and others else ""
        raise UsageError(f"{path}: no such run or checkpoint folder{hint}")
    if NAME.fullmatch(path.name) or (path / f"{PARTS[0]}.safetensors").is_file():
        return open_checkpoint(path)
    if not (path / "checkpoints").is_dir():
        raise UsageError(f"{path}: neither a run folder nor a checkpoint (no checkpoints in it)")
    return newest(path)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    places = (run / "checkpoints").glob("*kimg")
    found = [p for p in places if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_kimg)


def _kimg(path: Path) -> Decimal:
    return Decimal(path.name.removesuffix("kimg"))


def set_aside_newer(run: Path, images: int) -> list[Path]:
    """Move checkpoints of more than `images` into checkpoints/set-aside, and say where they are.

    A run that goes on from an earlier point (by choice, or because the newest were damaged) comes
    by their names again, with other contents.
    """
    aside = run / "checkpoints" / "set-aside"
    moved = []
    for path in checkpoints(run):
        if _kimg(path) * 1000 > images:
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / path.name, ignore_errors=True)  # set aside once before
            moved.append(path.rename(aside / path.name))
    return moved


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(run)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _checked_bytes(path: Path, part: str, files: Mapping[str, Any]) -> bytes:
    name = f"{part}.safetensors"
    try:
        content = (path / name).read_bytes()
        bytes_, digest = files[part]["bytes"], files[part]["sha256"]
    except (OSError, KeyError, TypeError) as error:
        raise RunError(f"checkpoint {path}: {name} cannot be read ({error})") from None
    if len(content) != bytes_:
        raise RunError(
            f"checkpoint {path} is damaged: {name} has {len(content):,} bytes instead of {bytes_:,}"
        )
    if hashlib.sha256(content).hexdigest() != digest:
        raise RunError(f"checkpoint {path} is damaged: {name} does not have the recorded SHA-256")
    return content
