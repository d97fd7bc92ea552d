"""The process that reads and decodes for `pool.DecodePool`.

Whatever a file makes a decoder do, print, crash, hang or ask for all memory, it does here: what is
printed goes nowhere, alarms end a decoder that hangs, and memory is limited, but for CUDA's. torch
stays out: DALI would import it where it finds it, which costs 470 MB and seconds.

Requests are lines of JSON on stdin; answers go to the descriptor that is the first argument: a line
of JSON, then the squares' bytes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from ..errors import RunError
from ..framing import Framing
from ..signals import TERMINATING
from .decode import Decoder, open_decoder
from .image_file import ImageFile, Member, sha256

MEMORY_BYTES = 2 << 30  # beyond what the decoder takes when it is opened
PIXEL_BYTES = 32  # and for each pixel of the largest image: 16-bit RGBA, and a few copies


def main() -> None:
    for number in (signal.SIGINT, *TERMINATING):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, which ends this
    answers = os.fdopen(int(sys.argv[1]), "wb")
    warnings.simplefilter("ignore")
    sys.modules["torch"] = None  # type: ignore[assignment]  # "not to be found"
    try:
        wanted = json.loads(sys.stdin.buffer.readline())
        framing = Framing(**wanted["framing"])
        try:
            decoder, faults = open_decoder(framing, wanted["decoders"], wanted["threads"])
        except RunError as error:
            _answer(answers, {"fault": str(error)})
            return
        if decoder.name != "dali-gpu":  # CUDA reserves addresses by the terabyte
            _limit_memory(MEMORY_BYTES + PIXEL_BYTES * framing.max_pixels)
        _answer(answers, {"name": decoder.name, "faults": faults})
        _serve(decoder, answers)
    except BrokenPipeError:  # the parent is gone
        pass
    except Exception as error:
        lines = traceback.extract_tb(error.__traceback__)
        where = f"{os.path.basename(lines[-1].filename)}:{lines[-1].lineno}"
        text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        _answer(answers, {"error": f"{text} ({where})"})


def _serve(decoder: Decoder, answers: IO[bytes]) -> None:
    requests: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    while (request := requests.get()) is not None:
        if isinstance(request, Exception):
            raise request
        cpu_s, wall_s, blobs, digests = request
        by_pillow, enlarged = decoder.by_pillow, decoder.enlarged
        _set_alarms(cpu_s, wall_s)
        decoded = iter(decoder.decode([blob for blob in blobs if isinstance(blob, bytes)]))
        _set_alarms(0, 0)
        results = [next(decoded) if isinstance(blob, bytes) else blob for blob in blobs]
        head = {
            "reasons": [result if isinstance(result, str) else None for result in results],
            "digests": digests,
            "by_pillow": decoder.by_pillow - by_pillow,
            "enlarged": decoder.enlarged - enlarged,
        }
        _answer(answers, head, [result for result in results if not isinstance(result, str)])


def _read(lines: IO[bytes], requests: SimpleQueue[Any]) -> None:
    """Read the files of the next requests while others are decoded."""
    try:
        for line in lines:
            cpu_s, wall_s, files = json.loads(line)
            blobs = [from_json(file).read() for file in files]
            requests.put((cpu_s, wall_s, blobs, [sha256(blob) for blob in blobs]))
        requests.put(None)
    except Exception as error:
        requests.put(error)


def _answer(
    answers: IO[bytes], head: dict[str, Any], squares: list[np.ndarray] | None = None
) -> None:
    answers.write(json.dumps(head).encode() + b"\n")
    for square in squares or []:
        answers.write(np.ascontiguousarray(square).data)
    answers.flush()


def _set_alarms(cpu_s: float, wall_s: float) -> None:
    """Unless they are set to 0 by then, SIGPROF or SIGALRM ends the process, Python or not."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def _limit_memory(more_bytes: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # where there is no such limit, as on macOS
        import resource

        with open("/proc/self/statm") as file:
            now_bytes = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now_bytes + more_bytes,) * 2)


def to_json(file: ImageFile) -> list[Any]:
    """What a worker needs of a file, as JSON values."""
    member = file.member
    place = member and [member.offset, member.packed_bytes, member.deflated, member.crc32]
    return [file.path, file.size_bytes, place, file.fault]


def from_json(values: list[Any]) -> ImageFile:
    path, size_bytes, place, fault = values
    return ImageFile("", path, size_bytes, 0, Member(*place) if place else None, fault)


if __name__ == "__main__":
    main()
