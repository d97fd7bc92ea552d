"""What a run folder holds, read for a report: what is missing or damaged becomes a line, no error.

A run may be going on, or have ended in the midst of a line; its folder may have come from another
machine, with some of its files. Nothing that is read can be so large that it matters.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .console import clock
from .data.image_file import open_regular
from .errors import UsageError
from .runlog import held_by

MAX_JSON, MAX_LINE, MAX_LOG = 1 << 16, 1 << 16, 1 << 24  # bytes
MAX_RECORDS, MAX_WARNINGS = 20, 100  # the last ones, and the first ones
LOG_HEAD, LOG_TAIL = 100, 200  # lines that are shown of a long log
LARGEST = 1e30  # of which numbers can still be drawn
COLUMNS = ("step", "kimg", "d_loss", "g_loss", "d_real", "d_fake")  # of losses.npy
NUMBERS = (
    *(*COLUMNS, "epoch", "img_per_s", "s_per_kimg", "elapsed_s"),
    *("gpu_memory_bytes", "skipped_steps", "diversity"),
)
TERMS = ("data", "count", "seed", "ema")  # evaluations compare where these are the same
PHASES = ("train", "sample", "save", "evaluate")  # of a tick's seconds
GRID = re.compile(r"fake-(\d{1,9}\.\d{3})kimg\.png")
AT = re.compile(r" *(\d+\.\d) kimg ")  # how the log says that a grid was written
MODE = re.compile(r"[a-z][a-z-]*")  # and, in its first ten columns, what is on
SIGN = "warning: "

Row = dict[str, Any]


@dataclass
class RunFiles:
    """Attributes:
    config, environment, status: config.json, env.json and run.json; {} where there are none.
    rows: stats.jsonl by `NUMBERS` (None where one is missing) and "seconds".
    records: metrics.jsonl, oldest first, the last MAX_RECORDS.
    distances: by "kimg" the SWD of its checkpoints and of real images ("swd", "floor"): of all
        records that compare with the last one.
    grids: pictures of samples, by thousands of images.
    warnings: what the log warns of, when (the line of a grid before it), and how often.
    modes: what the run said was on when it last started.
    notes: by what it is about, what is missing or damaged.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    distances: list[Row] = field(default_factory=list)
    grids: list[tuple[float, Path]] = field(default_factory=list)
    warnings: list[tuple[str, str, int]] = field(default_factory=list)
    modes: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, about: str, line: str) -> None:
        self.notes.setdefault(about, []).append(line)

    def picture(self, name: str) -> Path | None:
        """A picture of the run by its name, if it is there."""
        return self.path / name if (self.path / name).is_file() else None


def read_run(path: Path) -> RunFiles:
    """All that there is of a run.

    Raises:
        UsageError: there is no such folder, or it is none of a run.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise UsageError(f"RUN must be a run folder: {path} is {_what(path)}")
    if (path / "meta.json").is_file() and path.parent.name == "checkpoints":
        raise UsageError(f"RUN must be a run folder: {path} is a checkpoint of {path.parents[1]}")
    if not any((path / name).is_file() for name in ("config.json", "run.json", "stats.jsonl")):
        raise UsageError(f"RUN must be a run folder: {path} has no config.json and no stats.jsonl")
    run = RunFiles(path)
    run.config = _json(run, "config.json", "config")
    run.environment = _json(run, "env.json", "environment")
    run.status = _json(run, "run.json", "run")
    _read_rows(run)
    _read_records(run)
    _find_grids(run)
    _read_log(run)
    return run


def _what(path: Path) -> str:
    return "a file" if path.exists() else "not there"


def number(value: Any) -> float | None:
    """A number as it is, and None for all else, and for what no run comes to."""
    right = isinstance(value, int | float) and -LARGEST < value < LARGEST
    return value if right and not isinstance(value, bool) else None


def _plain(value: Any) -> Any:
    """Without numbers that are not finite, which JSON knows nothing of."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        value = _plain(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json(run: RunFiles, name: str, about: str) -> dict[str, Any]:
    try:
        with open_regular(run.path / name) as file:
            text = file.read(MAX_JSON + 1)
    except OSError as error:
        run.note(about, f"{name} is not there ({error.strerror or error}).")
        return {}
    value = _parsed(text) if len(text) <= MAX_JSON else None
    if value is None:
        run.note(
            about, f"{name} is damaged: it is not a JSON object of {MAX_JSON:,} bytes or less."
        )
    return value or {}


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends; of one that is too long, nothing but a space.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                line = b" \n"
            yield line


def _read_rows(run: RunFiles) -> None:
    damaged, cut = 0, False
    try:
        for line in _lines(run.path / "stats.jsonl"):
            row = _row(_parsed(line))
            if row is not None and (not run.rows or row["step"] > run.rows[-1]["step"]):
                run.rows.append(row)
            elif line.endswith(b"\n"):
                damaged += 1
            else:
                cut = True
    except OSError as error:
        run.note("curves", f"stats.jsonl is not there ({error.strerror or error}).")
    if damaged:
        run.note("curves", f"stats.jsonl: {damaged:,} damaged lines are left out.")
    if cut:
        run.note("curves", "stats.jsonl: its last line is cut short, and left out.")
    if not run.rows and (losses := _losses(run.path)):
        run.rows = losses
        run.note("curves", "The curves are from losses.npy, which has losses and D alone.")
    if run.rows and all(row["gpu_memory_bytes"] is None for row in run.rows):
        run.note("curves", "There is no curve of memory, which is counted on a GPU alone.")
    if not run.rows:
        run.note("curves", "No tick of the run has been recorded.")


def _row(values: dict[str, Any] | None) -> Row | None:
    if values is None:
        return None
    row: Row = {name: number(values.get(name)) for name in NUMBERS}
    seconds = values.get("seconds")
    row["seconds"] = {
        phase: number(seconds.get(phase)) if isinstance(seconds, dict) else None for phase in PHASES
    }
    return row if row["step"] is not None and row["kimg"] is not None else None


def _losses(path: Path) -> list[Row]:
    """The rows of losses.npy, or none."""
    try:
        with open_regular(path / "losses.npy") as file:
            table = np.load(file, allow_pickle=False)
        if table.dtype != np.float32 or table.ndim != 2 or table.shape[1] != len(COLUMNS):
            return []
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError, OverflowError):
        return []
    rows = [_row(dict(zip(COLUMNS, line, strict=True))) for line in table.tolist()]
    return [row for row in rows if row is not None]


def _read_records(run: RunFiles) -> None:
    damaged = 0
    found: list[tuple[list[Any], Row]] = []
    try:
        for line in _lines(run.path / "metrics.jsonl"):
            record = _parsed(line)
            rows = record.get("rows") if record is not None else None
            if record is None or not isinstance(rows, list):
                damaged += 1
                continue
            record["rows"] = [row for row in rows if isinstance(row, dict)]
            run.records.append(record)
            if distance := _distance(record):
                found.append(distance)
    except FileNotFoundError:
        pass
    except OSError as error:
        run.note("metrics", f"metrics.jsonl cannot be read ({error.strerror or error}).")
    if damaged:
        run.note("metrics", f"metrics.jsonl: {damaged:,} damaged lines are left out.")
    if (more := len(run.records) - MAX_RECORDS) > 0:
        run.note("metrics", f"metrics.jsonl: {more:,} older evaluations have no table here.")
        del run.records[:more]
    if found:
        last = found[-1][0]
        alike = {row["kimg"]: row for terms, row in found if terms == last}  # the last of each
        run.distances = [alike[kimg] for kimg in sorted(alike)]


def _distance(record: dict[str, Any]) -> tuple[list[Any], Row] | None:
    """What an evaluation of a checkpoint compares by, and a row of `distances`."""
    images, found = number(record.get("images_seen")), {}
    for role in ("model", "real"):
        swd = next((row.get("swd") for row in record["rows"] if row.get("role") == role), None)
        found[role] = number(swd.get("mean")) if isinstance(swd, dict) else None
    if images is None or found["model"] is None:
        return None
    row = {"kimg": images / 1000, "swd": found["model"], "floor": found["real"]}
    return [record.get(key) for key in TERMS], row


def _find_grids(run: RunFiles) -> None:
    try:
        names = os.listdir(run.path / "samples")
    except OSError:
        names = []
    found = [(float(match[1]), match[0]) for name in names if (match := GRID.fullmatch(name))]
    run.grids = [(kimg, run.path / "samples" / name) for kimg, name in sorted(found)]
    if not run.grids:
        run.note("samples", "There are no sample grids in samples/.")


def _read_log(run: RunFiles) -> None:
    try:
        with open_regular(run.path / "log.txt") as file:
            text = file.read(MAX_LOG)
            if file.read(1):
                run.note("log", f"log.txt: what comes after {MAX_LOG >> 20} MiB is left out.")
    except OSError as error:
        run.note("log", f"log.txt is not there ({error.strerror or error}): no warnings are known.")
        return
    lines = [line[:MAX_LINE] for line in text.decode("utf-8", "replace").splitlines()]
    found: Counter[str] = Counter()
    when: dict[str, str] = {}
    last, starting = "before the first grid", False
    for line in lines:
        if line.startswith("fastgan    "):
            run.modes, starting = {}, True
        if match := AT.match(line):
            last = f"after {match[1]} kimg"
        if line.startswith(SIGN):
            said = line.removeprefix(SIGN)
            found[said] += 1
            when.setdefault(said, last)
        elif starting:
            name = line[:10].rstrip()
            starting = line[10:11] == " " and MODE.fullmatch(name) is not None
            if starting:
                run.modes[name] = line[11:].strip()
    run.warnings = [(said, when[said], count) for said, count in found.items()][:MAX_WARNINGS]
    if (more := len(found) - MAX_WARNINGS) > 0:
        run.note("log", f"{more:,} more warnings are in log.txt.")
    if (more := len(lines) - LOG_HEAD - LOG_TAIL) > 0:
        lines[LOG_HEAD:-LOG_TAIL] = [f"... {more:,} lines are left out ..."]
    run.log = [line if len(line) <= 500 else f"{line[:500]}..." for line in lines]


def one_line(run: RunFiles) -> str:
    """The run in a sentence."""
    status, last = run.status.get("status"), run.rows[-1] if run.rows else {}
    kimg = number(run.status.get("kimg"))
    kimg = kimg if kimg is not None else last.get("kimg")
    names = {"done": "Done", "failed": "Failed", "preempted": "Stopped, to be resumed,"}
    said = names.get(status, "") if isinstance(status, str) else ""
    if status == "running":
        said = "Going on," if held_by(run.path) else "Ended without a word, perhaps killed,"
    parts = [f"{said or 'Trained'} at {kimg:,.7g} kimg" if kimg is not None else said or "Trained"]
    config = run.config
    parts.append(f"{config.get('size', '?')} px images of {config.get('data', 'unknown data')}")
    parts.append(f"batch {config.get('batch', '?')}")
    parts.append(str(run.environment.get("gpu") or run.environment.get("cpu") or "unknown machine"))
    speeds = sorted(row["img_per_s"] for row in run.rows if row["img_per_s"] is not None)
    if speeds:
        parts.append(f"{speeds[len(speeds) // 2]:,.0f} img/s")
    seconds = sum(s for row in run.rows for s in row["seconds"].values() if s is not None)
    if seconds > 0:
        parts.append(clock(seconds))
    return f"{' · '.join(parts)}."
