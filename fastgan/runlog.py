"""The run folder: its name, configuration, environment, status, lock and log.

runs/00003-faces-64px-b128-s999/
  config.json  env.json  run.json  run.lock  log.txt
  stats.jsonl  losses.npy  losses.json  losses.png  samples/  checkpoints/
"""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from .config import TrainConfig, config_from, differences, to_plain
from .durable import replace_file
from .errors import RunError, UsageError

fcntl: Any = None  # Windows has no flock: two runs in one folder are not told apart there
with suppress(ImportError):
    fcntl = importlib.import_module("fcntl")

# What may differ between a run and the command that continues it by `--resume auto`.
FREE = {"kimg", "epochs", "device", "out", "cache", "tick_kimg", "sample_kimg", "save_kimg", "keep"}


class Run:
    """An open run folder, locked until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = open(path / "run.lock", "a+")  # noqa: SIM115 - held for the run's life
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise RunError(f"{path} is in use by {holder}; wait for it or stop it") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    @classmethod
    def create(cls, config: TrainConfig) -> Self:
        """A new folder under `config.out`, numbered after those that are there."""
        config.out.mkdir(parents=True, exist_ok=True)
        label = f"{data_name(config.data)}-{config.size}px-b{config.batch}-s{config.seed}"
        number = max((_number(p) for p in config.out.iterdir()), default=-1) + 1
        while True:  # another run may take the number between the look and the mkdir
            path = config.out / f"{number:05d}-{label}"
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        (path / "samples").mkdir()
        (path / "checkpoints").mkdir()
        run = cls(path)
        run.write("config.json", to_plain(config))
        return run

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Replace a JSON file of the run in one piece."""
        replace_file(self.path / name, (json.dumps(values, indent=1) + "\n").encode())

    def status(self, status: str, step: int, images: int) -> None:
        """Record where the run stands: running, done, preempted or failed."""
        self.write("run.json", {"status": status, "step": step, "kimg": images / 1000})

    def close(self) -> None:
        self._lock.close()


def data_name(source: str) -> str:
    """A short name for a data source: `faces:10000` is faces, `/data/FFHQ 64/` is ffhq-64."""
    if source.startswith("faces:"):
        return "faces"
    name = re.sub(r"[^a-z0-9]+", "-", Path(source).absolute().name.lower()).strip("-")
    return name[:40] or "data"


def run_folder(path: Path) -> Path:
    """The run that a path given to `--resume` belongs to: itself, or a checkpoint's."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (run / "config.json").is_file():
        what = "holds no run (no config.json)" if run.is_dir() else "does not exist"
        raise UsageError(
            f"--resume must be auto, a run folder or one of its checkpoints: {run} {what}"
        )
    return run


def load_config(resume: str | Path) -> TrainConfig:
    """The configuration of the run that `--resume` names."""
    path = run_folder(Path(resume)) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    return config_from(values, f"{path}: ")


def latest_like(config: TrainConfig) -> Path | None:
    """The newest run under `config.out` with the same configuration, but for what is free to
    change.
    """
    if not config.out.is_dir():
        return None
    for path in sorted(config.out.iterdir(), key=_number, reverse=True):
        if _number(path) >= 0 and (path / "config.json").is_file():
            try:
                theirs = load_config(path)
            except (UsageError, RunError):  # of another version: not this configuration
                continue
            if not set(differences(theirs, config)) - FREE:
                return path
    return None


def _number(path: Path) -> int:
    found = re.match(r"(\d{5,})-", path.name)
    return int(found[1]) if found and path.is_dir() else -1
