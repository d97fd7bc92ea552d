"""One process of `worker.py`, as the one that started it sees it: requests, answers, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..framing import Framing
from ..signals import TERMINATING
from .image_file import ImageFile
from .worker import to_json

FILE_LIMIT_S = 30.0  # of the processor's time, for a single file
WALL_FACTOR = 10  # times as long by the clock, for what waits for ever: a machine may be busy
ENDED_BY_OTHERS = {signal.SIGKILL, signal.SIGINT, *TERMINATING}
WORKER = f"{__package__}.worker"


@dataclass(frozen=True)
class Decoded:
    """What came of some files: `squares` holds those without a reason, in order."""

    squares: np.ndarray  # uint8 [n, size, size, 3]
    reasons: list[str | None]  # why a file was refused; one line, its kind before the first colon
    digests: list[str | None]  # SHA-256 of each file that could be read


def joined(parts: Sequence[Decoded]) -> Decoded:
    """Several as one."""
    return Decoded(
        np.concatenate([part.squares for part in parts]),
        [reason for part in parts for reason in part.reasons],
        [digest for part in parts for digest in part.digests],
    )


class Died(Exception):
    """A worker ended, by itself or by a signal; the reason for a file that was alone in it."""

    def __init__(self, reason: str, *, by_file: bool = True) -> None:
        self.reason, self.by_file = reason, by_file  # whether a file may be what ended it


def _visible(decoders: Sequence[str], gpu: int | None) -> dict[str, str]:
    """What a process is to see of the GPUs: none where it decodes on the CPU, since DALI would take
    half a gigabyte of the first one all the same.
    """
    name = "CUDA_VISIBLE_DEVICES"
    if "dali-gpu" not in decoders:
        return {name: ""}
    if gpu is None:
        return {}
    return {name: os.environ[name].split(",")[gpu] if os.environ.get(name) else str(gpu)}


class DecodeProcess:
    """A process of `worker.py`, and the pipes to it; `gpu`: the number of the card that it may use,
    of those that this process sees (None: any).
    """

    def __init__(
        self, framing: Framing, decoders: Sequence[str], threads: int, gpu: int | None = None
    ) -> None:
        self._size = framing.size
        self._chosen: tuple[str, list[str]] | None = None
        root = str(Path(__file__).resolve().parents[2])  # fastgan may have been found in any way
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            # not stdout, where a site's own start-up may print
            here, there = os.pipe()
            self._answers = open(here, "rb")  # noqa: SIM115 - closed by `end`
            with open(there, "wb"):
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", WORKER, str(there)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(there,),
                    env={**os.environ, "PYTHONPATH": path, **_visible(decoders, gpu)},
                )
        except OSError as error:
            raise RunError(f"a process that decodes cannot be started: {error}") from None
        self._write({"framing": asdict(framing), "decoders": list(decoders), "threads": threads})

    def chosen(self) -> tuple[str, list[str]]:
        """The decoder that it opened, and what those before it lack."""
        if self._chosen is None:
            head = self._head()
            if "fault" in head:
                raise RunError(head["fault"])
            self._chosen = head["name"], head["faults"]
        return self._chosen

    def send(self, files: Sequence[ImageFile], limit_s: float) -> None:
        limits = (limit_s, WALL_FACTOR * limit_s)
        self._write([*limits, [to_json(file) for file in files]])

    def receive(self) -> tuple[Decoded, int, int]:
        """The answer to the oldest request, images by Pillow, and images enlarged."""
        self.chosen()
        head = self._head()
        count = sum(reason is None for reason in head["reasons"])
        squares = np.empty((count, self._size, self._size, 3), np.uint8)
        self._fill(squares.reshape(-1).data)
        decoded = Decoded(squares, head["reasons"], head["digests"])
        return decoded, head["by_pillow"], head["enlarged"]

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process, which whoever waits for it finds out."""
        self._process.kill()

    def end(self) -> None:
        """End the process and its pipes."""
        self._process.kill()
        assert self._process.stdin is not None
        with suppress(OSError):  # what could not be written to a dead process
            self._process.stdin.close()
        self._answers.close()
        self._process.wait()

    def _write(self, values: Any) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it died: `receive` says so
            self._process.stdin.write(json.dumps(values).encode() + b"\n")
            self._process.stdin.flush()

    def _head(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        head = json.loads(line)
        if "error" in head:
            raise Died(f"fails: {head['error']}", by_file=self._chosen is not None)
        return head

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            got = self._answers.readinto(buffer[done:])
            if not got:
                raise self._death()
            done += got

    def _death(self) -> Died:
        code = self._process.wait()
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            return Died(f"hangs: its decoder was not done after {FILE_LIMIT_S:g} s")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        by_file = self._chosen is not None and -code not in ENDED_BY_OTHERS
        return Died(f"crashes: its decoder died of {how}", by_file=by_file)
