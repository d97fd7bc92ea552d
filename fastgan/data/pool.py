"""Processes that decode (`worker.py`), kept busy from a bounded queue, their results in order.

A process that crashes or hangs is replaced, the files it was at are tried one by one in another,
and the one that is to blame is refused with the reason: nothing that a file holds reaches the
process that trains.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..env import cores
from ..errors import RunError
from ..framing import Framing
from .decode import DECODERS
from .image_file import ImageFile
from .worker import to_json

BATCH = 64  # files a request
BATCH_BYTES = 16 << 20  # or fewer, when they are large
AHEAD = 2  # requests a worker has: it reads the files of one while it decodes the other
MAX_WORKERS = 64  # a core each, 130 MB each
GPU_WORKERS = 2  # one sends and receives while the other decodes
BATCH_LIMIT_S = 120.0
FILE_LIMIT_S = 30.0
WORKER = f"{__package__}.worker"
NO_GPU = "no dali-gpu: torch sees no NVIDIA GPU"


@dataclass(frozen=True)
class Decoded:
    """What came of some files: `squares` holds those without a reason, in order."""

    squares: np.ndarray  # uint8 [n, size, size, 3]
    reasons: list[str | None]  # why a file was refused; one line, its kind before the first colon
    digests: list[str | None]  # SHA-256 of each file that could be read


class DecodePool:
    """Decodes image files in other processes.

    Args:
        decoder: dali-gpu, dali-cpu, pillow, or auto: the first of them that works here.
        gpu: whether auto may take the GPU.
        processes: at most so many, where fewer do.

    Attributes:
        name: the decoder that was chosen.
        why: what better ones lack; "" for the best.
        by_pillow, enlarged: images so far that Pillow took over, and whose part was smaller than
            the square.

    Raises:
        RunError: the decoder does not work here.
    """

    def __init__(
        self,
        framing: Framing,
        decoder: str = "auto",
        gpu: bool = True,
        processes: int = MAX_WORKERS,
    ) -> None:
        self.framing = framing
        self.by_pillow = self.enlarged = 0
        names, faults = list(DECODERS) if decoder == "auto" else [decoder], []
        if names[0] == "dali-gpu" and not torch.cuda.is_available():
            if decoder != "auto":
                raise RunError(f"--decoder {decoder}: {NO_GPU.partition(': ')[2]}")
            faults.append(NO_GPU)
        if faults or (decoder == "auto" and not gpu):
            names.remove("dali-gpu")
        count = max(1, min(cores(), MAX_WORKERS, processes))
        on_gpu = names[0] == "dali-gpu"
        self._threads = max(1, cores() // GPU_WORKERS) if on_gpu else 1
        # all at once: each takes the better part of a second to import DALI
        self._workers: list[_Worker | None] = [
            _Worker(framing, names, self._threads) for _ in range(GPU_WORKERS if on_gpu else count)
        ]
        self._spare: _Worker | None = None  # for single files
        try:
            self.name, found = self._worker(0).chosen()
        except BaseException:
            self.close()
            raise
        self.why = "; ".join(faults + found)
        if on_gpu and self.name != "dali-gpu":
            self._workers += [None] * max(0, count - GPU_WORKERS)

    def run(self, batches: Iterable[Sequence[ImageFile]]) -> Iterator[Decoded]:
        """Decode batch after batch; a few are under way while one is looked at."""
        waiting: deque[tuple[int, Sequence[ImageFile]]] = deque()
        try:
            for number, batch in enumerate(batches):
                if len(waiting) == AHEAD * len(self._workers):
                    yield self._next(waiting)
                place = number % len(self._workers)
                self._worker(place).send(batch, BATCH_LIMIT_S)
                waiting.append((place, batch))
            while waiting:
                yield self._next(waiting)
        finally:
            for place in {place for place, _ in waiting}:  # not waited for: it owes an answer
                self._end(place)

    def one(self, file: ImageFile) -> Decoded:
        """Decode a single file, under the limits of a single file."""
        if self._spare is None:
            self._spare = self._start()
        self._spare.send([file], FILE_LIMIT_S)
        try:
            return self._counted(self._spare.receive())
        except _Died as death:
            self._spare = None
            empty = np.empty((0, self.framing.size, self.framing.size, 3), np.uint8)
            return Decoded(empty, [death.reason], [None])

    def close(self) -> None:
        """End the processes."""
        for place in range(len(self._workers)):
            self._end(place)
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self, waiting: deque[tuple[int, Sequence[ImageFile]]]) -> Decoded:
        place, batch = waiting[0]
        try:
            answer = self._counted(self._worker(place).receive())
            waiting.popleft()
            return answer
        except _Died:
            self._end(place)
        waiting.popleft()
        singles = [self.one(file) for file in batch]
        for owed, later in waiting:
            if owed == place:
                self._worker(place).send(later, BATCH_LIMIT_S)
        return Decoded(
            np.concatenate([single.squares for single in singles]),
            [reason for single in singles for reason in single.reasons],
            [digest for single in singles for digest in single.digests],
        )

    def _counted(self, answer: tuple[Decoded, int, int]) -> Decoded:
        decoded, by_pillow, enlarged = answer
        self.by_pillow += by_pillow
        self.enlarged += enlarged
        return decoded

    def _worker(self, place: int) -> _Worker:
        worker = self._workers[place]
        if worker is None:
            worker = self._workers[place] = self._start()
        return worker

    def _start(self) -> _Worker:
        return _Worker(self.framing, [self.name], self._threads)

    def _end(self, place: int) -> None:
        worker, self._workers[place] = self._workers[place], None
        if worker is not None:
            worker.end()


def batches(files: Sequence[ImageFile]) -> Iterator[list[ImageFile]]:
    """The files in requests of a fair size."""
    batch: list[ImageFile] = []
    batch_bytes = 0
    for file in files:
        if batch and (len(batch) == BATCH or batch_bytes + file.size_bytes > BATCH_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(file)
        batch_bytes += file.size_bytes
    if batch:
        yield batch


class _Died(Exception):
    """A worker ended by itself; the reason as it is given for a file that was alone in it."""

    def __init__(self, code: int) -> None:
        if code == -signal.SIGALRM:
            self.reason = f"hangs: its decoder was not done after {FILE_LIMIT_S:.0f} s"
        else:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.reason = f"crashes: its decoder died of {how}"


class _Worker:
    """A process of `worker.py`, and the pipes to it."""

    def __init__(self, framing: Framing, decoders: Sequence[str], threads: int) -> None:
        self._size = framing.size
        self._chosen: tuple[str, list[str]] | None = None
        root = str(Path(__file__).resolve().parents[2])  # fastgan may have been found in any way
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        wanted = {"framing": asdict(framing), "decoders": list(decoders), "threads": threads}
        self._write(wanted)

    def chosen(self) -> tuple[str, list[str]]:
        """The decoder that it opened, and what those before it lack."""
        if self._chosen is None:
            try:
                head = self._head()
            except _Died as death:
                raise RunError(
                    f"the process that decodes cannot be started ({death.reason})"
                ) from None
            if "fault" in head:
                raise RunError(head["fault"])
            self._chosen = head["name"], head["faults"]
        return self._chosen

    def send(self, files: Sequence[ImageFile], limit_s: float) -> None:
        self._write([limit_s, [to_json(file) for file in files]])

    def receive(self) -> tuple[Decoded, int, int]:
        """The answer to the oldest request, images by Pillow, and images enlarged."""
        self.chosen()
        head = self._head()
        count = sum(reason is None for reason in head["reasons"])
        squares = np.empty((count, self._size, self._size, 3), np.uint8)
        self._fill(squares.reshape(-1).data)
        decoded = Decoded(squares, head["reasons"], head["digests"])
        return decoded, head["by_pillow"], head["enlarged"]

    def end(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what could not be written to a dead process
                assert pipe is not None
                pipe.close()
        self._process.wait()

    def _write(self, values: Any) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it died: `receive` says so
            self._process.stdin.write(json.dumps(values).encode() + b"\n")
            self._process.stdin.flush()

    def _head(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._died()
        head = json.loads(line)
        if "error" in head:
            raise RuntimeError(f"the process that decodes failed:\n{head['error']}")
        return head

    def _fill(self, buffer: memoryview) -> None:
        assert self._process.stdout is not None
        done = 0
        while done < len(buffer):
            got = self._process.stdout.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not got:
                self._died()
            done += got

    def _died(self) -> None:
        code = self._process.wait()
        self.end()
        raise _Died(code)
