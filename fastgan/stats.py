"""The numbers of a run: gathered on the device, read once a tick, kept as JSON lines, an array and
a picture.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .durable import replace_file
from .step import StepStats

COLUMNS = ("step", "kimg", *StepStats._fields)  # of losses.npy


class Accumulator:
    """Sums of the step's statistics since the last tick and the count of steps, on the device:
    adding to them can be part of a captured step.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(StepStats._fields) + 1, dtype=torch.float64, device=device)
        self._one = torch.ones((), device=device)

    def add(self, stats: StepStats) -> None:
        self.sums += torch.stack([*stats, self._one])

    def take(self) -> dict[str, float]:
        """The means since the last call, and start anew. This is the one host sync of a tick."""
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return dict(zip(StepStats._fields, (s / max(count, 1) for s in sums), strict=True))


class StatsLog:
    """stats.jsonl (a line a tick), losses.npy (float32 [ticks, columns]; losses.json names them)
    and losses.png.
    """

    def __init__(self, folder: Path, up_to_step: int = 0) -> None:
        """Opens the log of a run, without the lines after `up_to_step`: those will come again."""
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        path = folder / "stats.jsonl"
        if path.exists():
            self.rows = [row for row in _read_rows(path) if row["step"] <= up_to_step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        replace_file(path, text.encode())
        replace_file(folder / "losses.json", (json.dumps(list(COLUMNS)) + "\n").encode())
        self._write_losses()

    def add(self, row: dict[str, Any]) -> None:
        """Append one tick."""
        self.rows.append(row)
        with open(self.folder / "stats.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._write_losses()

    def losses(self) -> np.ndarray:
        """float32 [ticks, columns]."""
        table = [[row[name] for name in COLUMNS] for row in self.rows]
        return np.array(table, np.float32).reshape(len(self.rows), len(COLUMNS))

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


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows up to the first that is none: a kill may have cut the last line short."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if any(not isinstance(row[name], int | float) for name in COLUMNS):
                break
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows
