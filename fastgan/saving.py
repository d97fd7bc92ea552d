"""Checkpoints written beside training: the loop waits for a copy of the tensors, not for the disk.

Of tensors on a GPU the copy is taken by its own streams: there, in the order of the steps; then
from there to the host's memory while further steps run. Neither makes the host wait.
"""

from __future__ import annotations

import copy
import errno
import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, console
from .errors import RunError
from .packing import packed_bytes, places
from .tensor_file import Plain, plain

Parts = Mapping[str, Mapping[str, Tensor]]
QUERY_S = 0.001  # between two looks whether the copy has come from the GPU
POLL_S = 0.2  # a wait without a limit would hold back a signal where another thread gets it
ALIGN_BYTES = 64  # of each tensor's place in the copy


class Saver:
    """Writes a run's checkpoints in a thread of its own, from a copy of the tensors taken at once.

    One save at a time. What the thread met is reported by the methods, in the caller's thread: a
    checkpoint that could not be written (OSError) is a warning, and an error only if no later one
    is whole (`finish`); any other exception is raised by the next call.
    """

    def __init__(self, run: Path, keep: int) -> None:
        """Of the run folder `run`, `keep` checkpoints stay, and the best (`checkpoint.prune`)."""
        self._run, self._keep = run, keep
        self._staging = _Staging()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Save | None] = queue.SimpleQueue()
        self._save: _Save | None = None  # under way, or not reported yet
        self._failed: OSError | None = None  # of the last save that ended
        self._undeleted_told = False
        self._given_up = False

    def begin(self, images: int, parts: Parts, meta: dict[str, Any]) -> None:
        """Wait for the save before, take a copy of all tensors and begin to write it; the caller
        may change them as soon as this returns.

        Args:
            images, parts, meta: `checkpoint.save`'s.
        """
        self._wait()
        self._report()
        if self._thread is None:
            # a daemon: who is told twice to end does not wait for the disk, and the next save
            # sweeps what lies there half-written
            self._thread = threading.Thread(target=self._work, name="fastgan saver", daemon=True)
            self._thread.start()
        copied, ready = self._staging.take(parts)
        self._save = _Save(images, copied, copy.deepcopy(meta), ready)
        self._jobs.put(self._save)

    def collect(self) -> None:
        """Report a save that has ended, without waiting for one that has not."""
        if self._save is not None and self._save.ended.is_set():
            self._report()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            OSError: the last save failed.
        """
        self._wait()
        self._report(last=True)
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Wait for the save under way, if nobody gave that up; what it met is a warning at most."""
        if self._given_up:
            return
        self._wait()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()  # torch aborts a process that ends while a thread frees its tensors
            self._thread = None
        try:
            self._report()
        except Exception as error:  # another one is on its way up, or `finish` would have told
            console.warn(f"the checkpoint was not written: {type(error).__name__}: {error}")

    def _wait(self) -> None:
        try:
            while self._save is not None and not self._save.ended.wait(POLL_S):
                pass
        except BaseException:
            self._given_up = True
            raise

    def _report(self, last: bool = False) -> None:
        """Take note of a save that has ended; `last` leaves its failure to be raised."""
        save, self._save = self._save, None
        if save is None:
            return
        self._failed = save.error if isinstance(save.error, OSError) else None
        if save.error is not None and self._failed is None:
            raise save.error
        if self._failed is not None and not last:
            name = save.newest.name if save.newest is not None else "none"
            console.warn(
                f"checkpoint {checkpoint.kimg_name(save.images)} could not be written to "
                f"{self._run / 'checkpoints'}: {self._failed}; training goes on and will save "
                f"again at the next interval (the newest whole checkpoint: {name})"
            )
        if save.undeleted and not self._undeleted_told:
            self._undeleted_told = True
            path, error = save.undeleted[0]
            console.warn(
                f"{path} could not be deleted ({error}): training goes on, and such checkpoints "
                "stay until somebody deletes them"
            )

    def _work(self) -> None:
        """The thread: one save after another, until there is a None."""
        while (save := self._jobs.get()) is not None:
            ended = save.ended
            try:
                self._write(save)
            finally:
                del save  # what frees tensors must not be this thread, while the interpreter ends
                ended.set()

    def _write(self, save: _Save) -> None:
        """Nothing of torch is called here that lets go of Python's lock on the way (`Plain`), and
        no memory of a GPU is taken: the caller may be capturing.
        """
        try:
            while save.ready is not None and not save.ready.query():
                time.sleep(QUERY_S)
            folder = self._run / "checkpoints"
            try:
                checkpoint.save(folder, save.images, save.parts, save.meta)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                checkpoint.prune(self._run, self._keep)  # what is too many anyway makes room
                checkpoint.save(folder, save.images, save.parts, save.meta)
            save.undeleted = checkpoint.prune(self._run, self._keep)
        except BaseException as error:
            save.error = error
            if isinstance(error, OSError):
                with suppress(OSError, RunError):
                    save.newest = checkpoint.newest_by_looks(self._run)


@dataclass
class _Save:
    """One save, and what came of it, which the caller reads when it has ended."""

    images: int
    parts: Mapping[str, Mapping[str, Plain]]
    meta: dict[str, Any]
    ready: torch.cuda.Event | None
    ended: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    newest: Path | None = None  # that is whole, where this one failed
    undeleted: list[tuple[Path, OSError]] = field(default_factory=list)


class _Staging:
    """The host's memory for one copy of the tensors, kept for the next.

    All lie in one piece, those of a GPU first: one copy brings them over the bus. It is pinned
    then, and as large as what a checkpoint holds.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._side: torch.cuda.Stream | None = None

    @torch.no_grad()
    def take(self, parts: Parts) -> tuple[dict[str, dict[str, Plain]], torch.cuda.Event | None]:
        """The tensors as they are now, in the host's memory, each in a place of its own even if
        some share one; and the event that says that they are there, where they come from a GPU.
        They stay until the next call.
        """
        flat = [(part, name, t) for part, tensors in parts.items() for name, t in tensors.items()]
        flat.sort(key=lambda item: not _on_gpu(item[2]))  # stable: the order of the parts within
        tensors = [t for _, _, t in flat]
        on_gpu = [t for t in tensors if _on_gpu(t)]
        total = packed_bytes(tensors, ALIGN_BYTES)
        pinned = bool(on_gpu)
        if self._host is None or self._host.nbytes < total or self._host.is_pinned() != pinned:
            self._host = None  # before the next is taken
            self._host = _host_memory(total, pinned)
        views = places(self._host, tensors, ALIGN_BYTES)
        ready = self._from_gpu(on_gpu, self._host) if on_gpu else None
        for view, t in zip(views[len(on_gpu) :], tensors[len(on_gpu) :], strict=True):
            view.copy_(t)
        copied: dict[str, dict[str, Plain]] = {part: {} for part in parts}
        for (part, name, _), view in zip(flat, views, strict=True):
            copied[part][name] = plain(view)
        return copied, ready

    def _from_gpu(self, tensors: list[Tensor], host: Tensor) -> torch.cuda.Event:
        """Copy tensors of one GPU to the front of `host`, and return the event of its end."""
        device = tensors[0].device
        ready = torch.cuda.Event()
        current = torch.cuda.current_stream(device)
        total = packed_bytes(tensors, ALIGN_BYTES)
        try:
            there = torch.empty(total, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            # straight to the host, between two steps: the GPU waits for the bus, the host does not
            for view, t in zip(places(host, tensors, ALIGN_BYTES), tensors, strict=True):
                view.copy_(t, non_blocking=True)
            ready.record(current)
            return ready
        for view, t in zip(places(there, tensors, ALIGN_BYTES), tensors, strict=True):
            view.copy_(t)
        if self._side is None:
            self._side = torch.cuda.Stream(device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            host[:total].copy_(there, non_blocking=True)
        ready.record(self._side)
        there.record_stream(self._side)  # steps may not have its memory before
        return ready


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _host_memory(count: int, pinned: bool) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
