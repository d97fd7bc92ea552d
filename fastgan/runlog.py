"""The run folder: its name, its small JSON files, and the lock that keeps it to one process.

runs/00003-faces-64px-b128-s999/
  config.json  env.json  run.json  run.lock  log.txt
  stats.jsonl  losses.npy  losses.json  losses.png  samples/  checkpoints/
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from . import console
from .config import TrainConfig, to_plain
from .durable import replace_file
from .errors import RunError
from .lock import try_lock
from .paths import make_folder, slug

LOCK = "run.lock"


class Run:
    """An open run folder, locked until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lock = open(path / LOCK, "a+")  # noqa: SIM115 - held for the run's life
        except OSError as error:
            raise RunError(
                f"{path / LOCK} cannot be opened ({error.strerror}): a run is used by one process "
                "at a time, which has to be able to write there"
            ) from None
        try:
            if not try_lock(self._lock):
                holder = _holder(self._lock)
                self._lock.close()
                raise RunError(f"{path} is in use by {holder}; wait for it or stop it")
        except OSError as error:  # some network file systems are mounted without locks
            console.warn(f"{path} cannot be locked ({error}): see that no other run uses it")
            return
        with suppress(OSError):  # a full disk: the lock is held, if namelessly
            os.ftruncate(self._lock.fileno(), 0)
            os.write(
                self._lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode()
            )

    @classmethod
    def create(cls, config: TrainConfig) -> Self:
        """A new folder under `config.out`, numbered after those that are there."""
        make_folder(config.out, "--out")
        label = f"{data_name(config.data)}-{config.size}px-b{config.batch}-s{config.seed}"
        number = max((run_number(p) for p in config.out.iterdir()), default=-1) + 1
        while True:  # another run may take the number between the look and the mkdir
            path = config.out / f"{number:05d}-{label}"
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        run = cls(path)
        try:
            (path / "samples").mkdir()
            (path / "checkpoints").mkdir()
            # who looks for a run to go on with finds this
            run.write("config.json", to_plain(config))
        except OSError as error:
            run.close()
            raise RunError(f"the run {path} cannot be written: {error}") from None
        return run

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Replace a JSON file of the run in one piece; a number that is not finite, which JSON
        knows nothing of, becomes its name.
        """
        text = json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"
        replace_file(self.path / name, text.encode())

    def status(self, status: str, step: int, images: int) -> None:
        """Record where the run stands: running, done, preempted or failed."""
        self.write("run.json", {"status": status, "step": step, "kimg": images / 1000})

    def finish(self, step: int, images: int) -> None:
        """Record that the run is done where its end came before that could be."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            status = json.loads((self.path / "run.json").read_text("utf-8"))["status"]
            if status in ("running", "preempted"):
                self.status("done", step, images)

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()


def held_by(path: Path) -> str:
    """The process that has a run open; "" if none has."""
    with suppress(OSError), open(path / LOCK) as file:
        if not try_lock(file, shared=True):
            return _holder(file)
    return ""


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def data_name(source: str) -> str:
    """A short name for a data source: `faces:10000` is faces, `/data/FFHQ 64/` is ffhq-64."""
    if source.startswith("faces:"):
        return "faces"
    return slug(Path(source).absolute().name.removesuffix(".zip"), "data")


def run_number(path: Path) -> int:
    """The number that a run folder's name begins with; -1 for anything else."""
    found = re.match(r"(\d{5,})-", path.name)
    return int(found[1]) if found and path.is_dir() else -1
