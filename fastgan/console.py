"""What the user sees: plain lines, warnings and a progress bar.

Lines go to stdout, warnings to stderr, and both into every file opened with `log_to`. On a
terminal the bar is drawn in place by rich; elsewhere (a pipe, a Slurm log) it is a plain line
every few seconds. Of several processes rank 0 speaks (`speak_as`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0  # between two progress lines where there is no terminal

_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(highlight=False, soft_wrap=True, emoji=False, stderr=True)
_logs: list[Path] = []
_rank = 0
_hushed = False


def speak_as(rank: int) -> None:
    """This process is one of several: only rank 0 says what all would say."""
    global _rank
    _rank = rank


def say(line: str) -> None:
    """Print one line to stdout and to the open logs."""
    if not _hushed:
        _say(line)


def _say(line: str) -> None:
    if _rank == 0:
        _log(line)
        _print(_out, sys.stdout, line)


def warn(line: str, own: bool = False) -> None:
    """Print `warning: line` to stderr and to the open logs; from any rank if it is its `own`, which
    no other one knows.
    """
    if _rank == 0:
        _log(f"warning: {line}")
        _print(_err, sys.stderr, f"warning: {line}")
    elif own:
        _print(_err, sys.stderr, f"warning: rank {_rank}: {line}")


def _print(console: Console, stream: TextIO, line: str) -> None:
    try:
        if stream.isatty():
            console.file = stream
            console.print(line, markup=False)  # above the bar, where there is one
        else:
            stream.write(line + "\n")
        stream.flush()  # a pipe would hold it back, and a Slurm log be empty for minutes
    except OSError as error:
        # `fastgan train | tee log`, and tee is gone: training goes on, and the log has the lines
        if stream is sys.stdout:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
            warn(f"stdout is gone ({error.strerror}): going on without it")


def _log(line: str) -> None:
    for log in list(_logs):
        try:
            # opened for each line: nothing is held back that a full disk could hold up later
            with open(log, "ab", buffering=0) as file:
                file.write(f"{line}\n".encode(errors="backslashreplace"))
        except OSError as error:
            # it is on the screen, too; said once, or there would be two lines for each
            _logs.remove(log)
            warn(f"{log} cannot be written ({error.strerror}): going on without it")


@contextmanager
def hushed() -> Iterator[None]:
    """Inside the block nothing is said, and no bar is begun; what is warned of is, and a bar from
    before it goes on.
    """
    global _hushed
    before, _hushed = _hushed, True
    try:
        yield
    finally:
        _hushed = before


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Copy every line said inside the block to the end of a file."""
    _logs.append(path)
    try:
        yield
    finally:
        if path in _logs:
            _logs.remove(path)


class Bar:
    """A count that grows to `total`, with a rate; see `bar`."""

    def __init__(self, label: str, total: float, unit: str, start: float = 0.0) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self.done = start
        self.note = ""
        self._began = self._last = time.monotonic()
        self._heard = not _hushed
        self._rich: Progress | None = None
        if sys.stdout.isatty() and _rank == 0 and not _hushed:
            _out.file = sys.stdout
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=_out,
                transient=True,
            )
            self._task = self._rich.add_task(label, total=total, note="")
            self._rich.update(self._task, completed=start)
            self._rich.start()

    @property
    def rate(self) -> float:
        """Units per second since the bar began."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)

    def update(self, done: float, note: str | None = None) -> None:
        """Set the count to `done`; `note` replaces the text beside the bar (default: the rate)."""
        self.done = done
        self.note = note if note is not None else f"{self.rate:,.0f} {self.unit}/s"
        if self._rich is not None:
            self._rich.update(self._task, completed=done, note=self.note)
        elif self._heard and time.monotonic() - self._last >= PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            line = f"{self.label}: {100 * done / self.total:.0f}%  {self.note}"
            if done > self.start:
                line += f"  {clock((self.total - done) / max(self.rate, 1e-9))} left"
            _say(line)

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()


@contextmanager
def bar(label: str, total: float, unit: str = "img", start: float = 0.0) -> Iterator[Bar]:
    """A progress bar from `start` to `total`, gone when the block ends."""
    shown = Bar(label, total, unit, start)
    try:
        yield shown
    finally:
        shown.close()


def clock(seconds: float) -> str:
    """Seconds as `8s`, `2m 05s` or `3h 12m`."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    return f"{s // 3600}h {s % 3600 // 60:02d}m"
