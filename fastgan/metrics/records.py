"""The lines of JSON that evaluations leave in metrics.jsonl, and which checkpoint they make the
best of a run.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..console import warn
from ..data.image_file import open_regular
from ..durable import flush, replace_file
from ..run_files import TERMS

RECORDS = "metrics.jsonl"
FEWEST = 64  # images of each set, from which on an SWD says which checkpoint is better


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line in one piece; one that a kill left unfinished is ended before it.

    Raises:
        OSError: it cannot be written.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        flush(file)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first, without lines that are none; empty where there is no
    such file.
    """
    found = []
    try:
        with open_regular(path) as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    found.append(record)
    except OSError:
        pass
    return found


def set_aside_newer(run: Path, images: int) -> int:
    """Move the records of checkpoints of more than so many images into metrics.set-aside.jsonl, and
    return how many: a run that goes on from an earlier point comes by their names again.

    Raises:
        OSError: they cannot be written.
    """
    records = read(run / RECORDS)
    newer = [r for r in records if isinstance(n := r.get("images_seen"), int) and n > images]
    if newer:
        aside = (run / RECORDS).with_suffix(".set-aside.jsonl")
        for record in newer:
            append(aside, record)
        kept = (json.dumps(record) + "\n" for record in records if record not in newer)
        replace_file(run / RECORDS, "".join(kept).encode())
    return len(newer)


def mark(run: Path, path: Path, record: dict[str, Any]) -> str:
    """Mark the checkpoint at `path` as the run's best where its SWD is the lowest so far; returns
    in words which is the best now and why, "" where this says nothing of it.

    Numbers on other images, of other counts or another seed do not compare: a best one that was
    found by these stays, with a line that says so.
    """
    value, held = swd_of(record), checkpoint.best(run)
    if value is None or path.parent != run / "checkpoints":
        return ""
    if record["count"] < FEWEST:
        return f"not by so few images: {FEWEST} or more of each set"
    if held is not None and held.name != path.name:
        before = [r for r in read(run / RECORDS) if r.get("checkpoint") == held.name]
        like = [r for r in before if all(r.get(key) == record.get(key) for key in TERMS)]
        theirs = swd_of(like[-1]) if like else None
        if theirs is None:
            return f"{held.name} stays, which was not evaluated like this: evaluate it too"
        if theirs <= value:
            return f"{held.name} stays, with an SWD of {theirs:.2f}"
    try:
        checkpoint.mark_best(run, path, "swd", value)
    except OSError as error:
        warn(f"{run / checkpoint.BEST} cannot be written: {error.strerror or error}")
        return ""
    return f"{path.name} is the run's best so far by SWD: it is kept"


def swd_of(record: dict[str, Any]) -> float | None:
    """The mean SWD of what was evaluated."""
    try:
        (value,) = (r["swd"]["mean"] for r in record["rows"] if r["role"] == "model")
        return float(value) if math.isfinite(value) else None
    except (KeyError, TypeError, ValueError):
        return None
