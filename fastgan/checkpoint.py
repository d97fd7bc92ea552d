"""Checkpoints: a folder of safetensors and one JSON record, complete or absent, and checked before
it is used.

    checkpoints/000120.064kimg/
      model.safetensors   g.NAME, d.NAME, ema.NAME: parameters and buffers of the three networks
      optim.safetensors   g.NAME.exp_avg, ...: both optimizers
      state.safetensors   random.latents, ema.steps, stats.sums, loss_scale.* (fp16): what else
                          changes step by step
      meta.json           format version, counters, feed position, configuration; bytes and
                          SHA-256 of each file, and of all this the SHA-256
    best.json             beside `checkpoints`: which of them a metric found the best

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

from . import console, formats
from .durable import check_space, flush_folder, replace_file, write_flushed
from .errors import RunError, UsageError, first_line
from .tensor_file import Tensors, file_bytes, write_tensors

PARTS = ("model", "optim", "state")
META, BEST = "meta.json", "best.json"
# What meta.json holds beside the format version and the digests.
RECORD = {
    "images": int,
    "step": int,
    "world": int,
    "device": str,
    "feed": dict,
    "data": dict,
    "config": dict,
}
SEALED = range(3, formats.VERSION + 1)  # the formats whose meta.json has a digest of itself
NAME = re.compile(r"\d{6,}\.\d{3}kimg")


def kimg_name(images: int) -> str:
    """Images as a name: 120064 is `000120.064kimg`."""
    return f"{images // 1000:06d}.{images % 1000:03d}kimg"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written. What older versions of fastgan wrote
    differently is given in the newest form (formats.py).
    """

    path: Path
    meta: dict[str, Any]
    written: dict[str, Any]  # meta.json as it is

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of "model", "optim" or "state" by name, on the CPU."""
        content = _checked_bytes(self.path, part, self.written["files"])
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(content)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise RunError(
                f"checkpoint {self.path}: {part}.safetensors is none ({reason})"
            ) from None
        if part == "state":
            return formats.upgraded(self.written, str(self.path), tensors)[1]
        return tensors


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def save(folder: Path, images: int, parts: Mapping[str, Tensors], meta: dict[str, Any]) -> Path:
    """Write one checkpoint into `folder` and return its path.

    Raises:
        OSError: the disk is full (nothing is written when that is known before) or the folder
            cannot be written; nothing half-written stays.
    """
    final = folder / kimg_name(images)
    if final.exists():  # saved at this very step already
        return final
    folder.mkdir(parents=True, exist_ok=True)
    # of a process that was killed: the run's lock says that it is gone
    for stale in folder.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    check_space(folder, sum(file_bytes(parts[part]) for part in PARTS))
    scratch = folder / f".{final.name}.tmp"
    scratch.mkdir()
    try:
        files = {}
        for part in PARTS:
            count, digest = write_tensors(scratch / f"{part}.safetensors", parts[part])
            files[part] = {"bytes": count, "sha256": digest}
        record = {"format_version": formats.VERSION, "images": images, **meta, "files": files}
        write_flushed(scratch / META, (json.dumps(sealed(record), indent=1) + "\n").encode())
        flush_folder(scratch)
        os.rename(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    flush_folder(folder)
    return final


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a meta.json with its own digest, under "sha256": that of the rest as JSON with
    sorted keys and without spaces. Every format from 3 on has it.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(meta)))
    plain.pop("sha256", None)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return {**plain, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every file of it verified; `RunError` names the damaged file."""
    written = _read_meta(path)
    meta, _ = formats.upgraded(written, str(path))
    wrong = [key for key, kind in RECORD.items() if not isinstance(meta.get(key), kind)]
    wrong += [key for key in ("step", "images") if key not in wrong and meta[key] < 0]
    wrong += ["world"] if "world" not in wrong and meta["world"] < 1 else []
    if wrong:
        raise RunError(f"checkpoint {path} is damaged: {META} has no right {', '.join(wrong)}")
    if NAME.fullmatch(path.name) and path.name != kimg_name(meta["images"]):
        raise RunError(f"checkpoint {path} is another one: {META} is of {meta['images']:,} images")
    for part in PARTS:
        _checked_bytes(path, part, written["files"])
    return Checkpoint(path, meta, written)


def looks_whole(path: Path) -> bool:
    """Whether meta.json is right and every file is as long as it says: what can be told without
    reading them.
    """
    try:
        files = _read_meta(path)["files"]
        sizes = {part: (path / f"{part}.safetensors").stat().st_size for part in PARTS}
        return all(sizes[part] == files[part]["bytes"] for part in PARTS)
    except (RunError, OSError, KeyError, TypeError):
        return False


def newest_by_looks(run: Path) -> Path | None:
    """The newest checkpoint of a run that `looks_whole`, if there is one.

    Raises:
        RunError: its checkpoints cannot be listed.
    """
    return next(filter(looks_whole, reversed(checkpoints(run))), None)


def _read_meta(path: Path) -> dict[str, Any]:
    """The content of meta.json, whole by its own digest."""
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text("utf-8"))
        version, _ = meta["format_version"], meta["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"checkpoint {path}: {META} cannot be read ({error})") from None
    # asked of whatever has one: a damaged version must not pass for one from before there were any
    has_digest = "sha256" in meta or version in SEALED
    if has_digest and meta.get("sha256") != sealed(meta)["sha256"]:
        raise RunError(f"checkpoint {path} is damaged: {META} does not have its recorded SHA-256")
    return meta


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
    raise RunError(f"{run}: none of its {len(paths)} checkpoints can be used")


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
    try:
        names = os.listdir(run / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{run / 'checkpoints'} cannot be read: {error.strerror}") from None
    paths = [run / "checkpoints" / name for name in names if NAME.fullmatch(name)]
    return sorted((path for path in paths if path.is_dir()), key=_kimg)


def _kimg(path: Path) -> Decimal:
    return Decimal(path.name.removesuffix("kimg"))


def set_aside_newer(run: Path, images: int, start: Path | None = None) -> list[Path]:
    """Move checkpoints of `images` and more, but for the one at `start`, into
    checkpoints/set-aside, and say where they are.

    A run that goes on from an earlier point (by choice, or because the newest were damaged) comes
    by their names again, with other contents.
    """
    aside = run / "checkpoints" / "set-aside"
    moved = []
    for path in checkpoints(run):
        is_start = start is not None and os.path.realpath(path) == os.path.realpath(start)
        if _kimg(path) * 1000 >= images and not is_start:
            if path.name == _best_name(run):
                (run / BEST).unlink()  # another will have its name
            aside.mkdir(exist_ok=True)
            free, count = aside / path.name, 1
            while free.exists():  # set aside once before
                count += 1
                free = aside / f"{path.name}-{count}"
            moved.append(path.rename(free))
    return moved


def mark_best(run: Path, path: Path, metric: str, value: float) -> None:
    """Record that of the run's checkpoints the one at `path` is the best by a metric: `prune` lets
    it be.
    """
    content = {"checkpoint": path.name, "metric": metric, "value": value}
    replace_file(run / BEST, (json.dumps(content, indent=1) + "\n").encode())
    flush_folder(run)


def best(run: Path) -> Path | None:
    """The checkpoint that `mark_best` named last; None if there is none, or it is not whole by its
    looks.
    """
    try:
        name = _best_name(run)
    except OSError:
        return None
    path = run / "checkpoints" / (name or "none")
    return path if name and looks_whole(path) else None


def _best_name(run: Path) -> str | None:
    """The name in best.json; None without a right one."""
    try:
        name = json.loads((run / BEST).read_text("utf-8"))["checkpoint"]
        return name if NAME.fullmatch(name) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def prune(run: Path, keep: int) -> list[tuple[Path, OSError]]:
    """Delete what is older than the newest `keep` checkpoints that look whole, but for the best.

    A damaged one among them does not count: no older one is deleted in its favour. Returns what
    could not be deleted, and why.
    """
    try:
        paths = checkpoints(run)
    except RunError as error:
        return [(run / "checkpoints", OSError(str(error)))]
    kept, failed = 0, []
    for path in reversed(paths):
        if kept < keep:
            kept += looks_whole(path)
            continue
        try:
            if path.name != _best_name(run):  # asked each time: it may be marked meanwhile
                _delete(path)
        except OSError as error:
            failed.append((path, error))
    return failed


def _delete(path: Path) -> None:
    """Renamed before: what a kill leaves of it is no damaged checkpoint, and the next save sweeps
    it.
    """
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleted.tmp")))


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
