"""The numbers of a run: gathered on the device, read once a tick, kept as JSON lines, an array and
a picture.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgan_kernels import tally

from . import console
from .durable import replace_file
from .step import StepStats

RECENT = 50  # steps whose statistics are kept one by one
COLUMNS = ("step", "kimg", *StepStats._fields)  # of losses.npy


class Accumulator:
    """Sums of the step's statistics since the last tick and the count of steps, and the last steps
    one by one, on the device: adding to them can be part of a captured step.

    Attributes:
        sums: float64 [fields + 1], of `StepStats`'s fields and of 1.
        recent: float64 [RECENT, fields + 1], a ring of the last steps.
        count: 0-d int64, the steps that have gone into it.
    """

    def __init__(self, device: torch.device, impl: str = "auto") -> None:
        """`impl`: `tally`'s."""
        width = len(StepStats._fields) + 1
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.recent = torch.zeros(RECENT, width, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._impl = impl

    def add(self, stats: StepStats, frozen: torch.Tensor) -> None:
        """One step, which is the `frozen`th (0-d) of those that changed nothing; 0: it is none."""
        tally(stats, frozen, self.sums, self.recent, self.count, impl=self._impl)

    def take(self) -> dict[str, float]:
        """The means since the last call, and start anew. This is the one host sync of a tick."""
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return dict(zip(StepStats._fields, (s / max(count, 1) for s in sums), strict=True))

    def last(self, step: int) -> list[dict[str, float]]:
        """The last steps up to number `step`, one row each."""
        rows, count = self.recent.tolist(), int(self.count)
        names, kept = ("step", *StepStats._fields), min(count, RECENT)
        return [
            dict(zip(names, (step - back, *rows[(count - 1 - back) % RECENT][:-1]), strict=True))
            for back in reversed(range(kept))
        ]

    def drop_last(self) -> None:
        """Forget the last step."""
        self.recent[(self.count - 1) % RECENT] = 0
        self.count -= 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {"sums": self.sums, "recent": self.recent, "steps": self.count}


class StatsLog:
    """stats.jsonl (a line a tick), losses.npy (float32 [ticks, columns]; losses.json names them)
    and losses.png.
    """

    def __init__(self, folder: Path, up_to_step: int = 0) -> None:
        """Opens the log of a run, without the lines after `up_to_step`: those will come again."""
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._whole = False  # whether the file is what `rows` is
        path = folder / "stats.jsonl"
        if path.is_file():
            self.rows, wrong = _read_rows(path, up_to_step)
            if wrong:
                kept = path.with_suffix(".damaged.jsonl")
                replace_file(kept, path.read_bytes())
                console.warn(f"{wrong} lines of {path} are damaged: left out, and kept in {kept}")
        self._write_rows()
        replace_file(folder / "losses.json", (json.dumps(list(COLUMNS)) + "\n").encode())
        self._write_losses()

    def add(self, row: dict[str, Any]) -> None:
        """Append one tick.

        Raises:
            OSError: it could not be written; the next call writes it, too.
        """
        self.rows.append(row)
        if self._whole:
            self._whole = False  # until this line is there, too
            with open(self.folder / "stats.jsonl", "ab", buffering=0) as file:
                line = (json.dumps(row) + "\n").encode()
                self._whole = file.write(line) == len(line)
        if not self._whole:
            self._write_rows()
        self._write_losses()

    def losses(self) -> np.ndarray:
        """float32 [ticks, columns]."""
        table = [[row[name] for name in COLUMNS] for row in self.rows]
        return np.array(table, np.float32).reshape(len(self.rows), len(COLUMNS))

    def _write_rows(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        replace_file(self.folder / "stats.jsonl", text.encode())
        self._whole = True

    def _write_losses(self) -> None:
        content = io.BytesIO()
        np.save(content, self.losses())
        replace_file(self.folder / "losses.npy", content.getvalue())

    def plot(self) -> None:
        """Draw losses.png: G and D loss above; D(x) and D(G(z)) below, with the line 0.5 where D
        cannot tell.
        """
        from matplotlib.figure import Figure  # 0.4 s to import, and only a run needs it

        kimg = [row["kimg"] for row in self.rows]
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(kimg, [row["g_loss"] for row in self.rows], label="G loss", color="tab:blue")
        above.plot(kimg, [row["d_loss"] for row in self.rows], label="D loss", color="tab:orange")
        above.set_ylabel("loss")
        below.plot(kimg, [row["d_real"] for row in self.rows], label="D(x)", color="tab:green")
        below.plot(kimg, [row["d_fake"] for row in self.rows], label="D(G(z))", color="tab:red")
        below.axhline(0.5, color="gray", linewidth=1, linestyle="--", label="0.5")
        below.set(ylabel="mean probability of real", xlabel="thousands of images", ylim=(0, 1))
        for axes in (above, below):
            axes.legend(loc="upper right")
            axes.grid(alpha=0.3)
        content = io.BytesIO()
        figure.savefig(content, dpi=100)
        replace_file(self.folder / "losses.png", content.getvalue())


def _read_rows(path: Path, up_to_step: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of stats.jsonl up to a step, and how many lines are none; a kill may have cut the
    last one short, which is no loss.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    wrong = 0
    for line in lines[:-1]:
        row = _row(line)
        if row is not None and row["step"] > up_to_step:
            continue
        if row is not None and (not rows or row["step"] > rows[-1]["step"]):
            rows.append(row)
        else:
            wrong += 1
    return rows, wrong


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row, with a number in each column."""
    try:
        row: dict[str, Any] = json.loads(line)
        numbers = [row[name] for name in COLUMNS]
        if row.get("diversity") is not None:
            numbers.append(row["diversity"])
        right = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
        return row if right else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
