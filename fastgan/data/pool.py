"""Processes that decode (`worker.py`), kept busy from a bounded queue, their results in order.

A process that crashes, hangs or fails is replaced, and the files it was at are tried one by one:
each in a process of its own if need be, and by Pillow if not by another decoder. The file that is
to blame is refused with the reason. Nothing that a file makes a decoder do reaches the process that
trains. Only decoding is limited in time: a drive that does not answer is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np

from ..config import DataOptions
from ..console import say, warn
from ..env import cores, driver_cuda
from ..errors import RunError
from ..framing import Framing
from . import process
from .decode import AUTO
from .image_file import ImageFile, printable, sha256, suffix_of
from .images import JPEG_SUFFIXES
from .process import Decoded, DecodeProcess, Died, joined

BATCH = 64  # files a request
BATCH_BYTES = 16 << 20  # or fewer, when they are large
AHEAD = 2  # requests a worker has: it reads the files of one while it decodes the other
MAX_WORKERS = 64  # a core each; 45 MB each, by DALI 130
GPU_WORKERS = 2  # one sends and receives while the other decodes
BATCH_LIMIT_S = 120.0  # of the processor's time
TRIES = 5  # of a file whose processes somebody else ends
# of JPEGs, a core: below that the cores are done before CUDA has started (estimated, not measured)
GPU_PAYS_BYTES = 256 << 20
NO_GPU = "no dali-gpu: there is no NVIDIA GPU"


class Interrupted(Exception):
    """`DecodePool.interrupt` ended what was under way."""


class DecodePool:
    """Decodes image files in other processes.

    Args:
        decoders: names of decoders (`decode.py`); the first that works here is taken.
        processes: at most so many, where fewer do.
        gpu: the card to decode on, of those that this process sees; None for the first.

    Attributes:
        name: the decoder that was chosen.
        why: what better ones lack; "" for the best.
        by_pillow, enlarged: images so far that Pillow took over, and whose part was smaller than
            the square.

    Raises:
        RunError: the decoder does not work here, or no process can be started.
    """

    def __init__(
        self,
        framing: Framing,
        decoders: Sequence[str] = AUTO,
        processes: int = MAX_WORKERS,
        gpu: int | None = None,
    ) -> None:
        self.framing, self._gpu = framing, gpu
        self.by_pillow = self.enlarged = 0
        self._interrupted = False
        self._workers: list[DecodeProcess | None] = []
        self._spares: dict[str, DecodeProcess] = {}  # for single files, by decoder
        names, faults = list(decoders), []
        if names[0] == "dali-gpu" and not driver_cuda():
            faults.append(NO_GPU)
            del names[0]
            if not names:
                raise RunError(f"--decoder dali-gpu: {NO_GPU.partition(': ')[2]}")
        count = max(1, min(cores(), MAX_WORKERS, processes))
        on_gpu = names[0] == "dali-gpu"
        self._threads = max(1, count // GPU_WORKERS) if on_gpu else 1
        try:
            for _ in range(GPU_WORKERS if on_gpu else count):
                # all at once: each takes the better part of a second to import DALI
                self._workers.append(self._started(names))
            self.name, found = self._worker(0).chosen()
        except Died as death:
            self.close()
            raise RunError(f"the process that decodes cannot be started ({death.reason})") from None
        except BaseException:
            self.close()
            raise
        self.why = "; ".join(faults + found)
        if on_gpu and self.name != "dali-gpu":
            self._workers += [None] * max(0, count - GPU_WORKERS)

    def run(self, batches: Iterable[Sequence[ImageFile]]) -> Generator[Decoded]:
        """Decode batch after batch; a few are under way while one is looked at."""
        self._interrupted = False  # here, and not when the first is asked for by another thread
        for place, worker in enumerate(self._workers):
            if worker is not None and not worker.alive():
                self._end(place)
        return self._run(batches)

    def _run(self, batches: Iterable[Sequence[ImageFile]]) -> Generator[Decoded]:
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
        """Decode a single file under the limits of a single file, by Pillow if all else fails."""
        # CUDA's memory cannot be limited
        first = "dali-cpu" if self.name == "dali-gpu" else self.name
        reason = ""
        for name in dict.fromkeys((first, "pillow")):
            answer = self._try(file, name)
            if isinstance(answer, Decoded):
                self.by_pillow += bool(reason) and len(answer.squares)
                return answer
            reason = reason or answer
        empty = np.empty((0, self.framing.size, self.framing.size, 3), np.uint8)
        return Decoded(empty, [reason], [sha256(file.read())])

    def interrupt(self) -> None:
        """From another thread: end what `run` or `one` waits for, with `Interrupted`."""
        self._interrupted = True
        for worker in [*self._workers, *self._spares.values()]:
            if worker is not None:
                worker.kill()

    def close(self) -> None:
        """End the processes."""
        for place in range(len(self._workers)):
            self._end(place)
        for spare in self._spares.values():
            spare.end()
        self._spares = {}

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next(self, waiting: deque[tuple[int, Sequence[ImageFile]]]) -> Decoded:
        place, batch = waiting[0]
        try:
            worker = self._worker(place)
            self._check_choice(worker)
            answer = self._counted(worker.receive())
            waiting.popleft()
            return answer
        except Died:
            self._end(place)
        waiting.popleft()
        singles = [self.one(file) for file in batch]
        for owed, later in waiting:
            if owed == place:
                self._worker(place).send(later, BATCH_LIMIT_S)
        return joined(singles)

    def _try(self, file: ImageFile, name: str) -> Decoded | str:
        """What a decoder makes of a file, or how the file ended a fresh process of it."""
        for _ in range(TRIES):
            self._check_interrupted()
            fresh = name not in self._spares
            if fresh:
                self._spares[name] = self._started([name])
                self._check_interrupted()
            self._spares[name].send([file], process.FILE_LIMIT_S)
            try:
                return self._counted(self._spares[name].receive())
            except Died as death:
                self._spares.pop(name).end()
                reason = death.reason
                if fresh and death.by_file:
                    return reason
        raise RunError(
            f"the processes that decode {printable(file.name)} are ended again and again, as if "
            f"for lack of memory ({reason}): give more, lower --max-pixels, or move the file away"
        )

    def _counted(self, answer: tuple[Decoded, int, int]) -> Decoded:
        decoded, by_pillow, enlarged = answer
        self.by_pillow += by_pillow
        self.enlarged += enlarged
        return decoded

    def _check_choice(self, worker: DecodeProcess) -> None:
        """All by one decoder: another's squares may differ by a level."""
        name, faults = worker.chosen()
        if name != self.name:
            raise RunError(
                f"one process decodes with {self.name}, another only with {name} "
                f"({'; '.join(faults)}): --decoder {name} lets all of them"
            )

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise Interrupted

    def _worker(self, place: int) -> DecodeProcess:
        self._check_interrupted()
        worker = self._workers[place]
        if worker is None:
            worker = self._workers[place] = self._started([self.name])
            self._check_interrupted()  # `interrupt` may have passed before it was there
        return worker

    def _started(self, names: Sequence[str]) -> DecodeProcess:
        return DecodeProcess(self.framing, names, self._threads, self._gpu)

    def _end(self, place: int) -> None:
        worker, self._workers[place] = self._workers[place], None
        if worker is not None:
            worker.end()


def open_pool(
    options: DataOptions,
    files: Sequence[ImageFile],
    *,
    again: bool = False,
    among: int = 1,
    gpu: int | None = None,
) -> DecodePool:
    """The processes that decode these files by these options, again and again or once; says which
    decoder they have. The machine's cores are for so many pools (`among`); `gpu` is `DecodePool`'s.
    """
    framing = Framing(**options.model_dump(include=set(Framing.__dataclass_fields__)))
    processes = min(sum(1 for _ in batches(files)), max(1, cores() // among))
    names = _fastest(files, again) if options.decoder == "auto" else (options.decoder,)
    pool = DecodePool(framing, names, processes, gpu)
    tell = say if pool.why in ("", NO_GPU) else warn
    tell(f"decoding with {pool.name}{f' ({pool.why})' if pool.why else ''}")
    return pool


def _fastest(files: Sequence[ImageFile], again: bool) -> Sequence[str]:
    """What `auto` tries: the GPU for a set of JPEGs, if it is large or read again and again.

    A PNG is inflated on the CPU wherever it goes, by kornia-rs in a third of DALI's time. On a CPU
    Pillow (with kornia-rs) is as fast as DALI once both are running, and starts a second sooner.
    """
    jpegs = [file.size_bytes for file in files if suffix_of(file.name) in JPEG_SUFFIXES]
    large = again or sum(jpegs) >= GPU_PAYS_BYTES * cores()
    return AUTO if large and 2 * len(jpegs) > len(files) else AUTO[-1:]


def batches(files: Iterable[ImageFile]) -> Iterator[list[ImageFile]]:
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
