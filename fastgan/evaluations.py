"""Evaluations of a run while it trains (`--eval-kimg`), each of a checkpoint on the disk: as
`fastgan evaluate CHECKPOINT` measures it, with its line in the run's metrics.jsonl.

Training goes on with the bits that it would have had without, whatever becomes of one: a metric is
no reason to lose a run. A signal ends an evaluation at the next piece of its work, within seconds.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from . import console
from .checkpoint import kimg_name
from .commands import EvaluateCommand
from .config import TrainConfig
from .data.cache import Cache
from .data.loader import Data
from .errors import RunError, UsageError, first_line
from .metrics import inception
from .metrics.evaluate import evaluate_by
from .metrics.plan import enough, halves
from .metrics.records import RECORDS, read, set_aside_newer
from .recorder import Recorder
from .report_metrics import MEASURES, value_at
from .signals import said
from .state import State

FLAG = "--eval-metrics"
# What the other half of the real images has says what a number can come to, or is to be near to.
BESIDE = {"swd": "floor", "swd_mmagic": "floor", "ms_ssim": "real", "fid": "floor"}

Stopping = Callable[[], int]  # the signal that the run is to stop by, or 0


class _Stopped(Exception):
    """The run is to stop, and with it an evaluation."""


def check_metrics(config: TrainConfig) -> None:
    """That evaluations can be what is asked, as far as it is known before the images are.

    Raises:
        UsageError: naming the flag.
    """
    if config.eval_kimg is None:
        return
    if not config.eval_metrics:
        raise UsageError(f"{FLAG} must name a metric or more with --eval-kimg, got none")
    if config.loader == "dali":
        raise UsageError(
            "--eval-kimg needs the images decoded, and --loader dali keeps none: leave one of them "
            "out (`fastgan evaluate RUN` makes a cache, and measures checkpoints at any time)"
        )
    enough({f"--eval-count {config.eval_count}": config.eval_count}, config.eval_metrics, FLAG)
    if "inception" in config.eval_metrics:
        inception.require_library(FLAG)
        if inception.find(None) is None:
            raise UsageError(f"{FLAG} inception: {inception.DOWNLOAD}")


def check_images(config: TrainConfig, data: Data) -> None:
    """That there are images enough.

    Raises:
        UsageError: naming the flag and the metric.
    """
    if config.eval_kimg is not None:
        most = {f"--eval-count {config.eval_count}": config.eval_count, **halves(data.count)}
        enough(most, config.eval_metrics, FLAG)


def evaluated(path: Path) -> bool:
    """Whether the metrics.jsonl of its run has a record of a checkpoint."""
    records = read(path.parent.parent / RECORDS)
    return any(record.get("checkpoint") == path.name for record in records)


class Evaluations:
    """Those of a run, which rank 0 makes (it has the recorder) while the others wait."""

    def __init__(self, state: State, recorder: Recorder | None) -> None:
        self._state, self._recorder = state, recorder

    def begin(self) -> None:
        """When a run goes on: what was found of it after this point is set aside."""
        if self._recorder is None:
            return
        try:
            count = set_aside_newer(self._recorder.run.path, self._state.images)
        except OSError as error:
            console.warn(f"evaluations of later checkpoints could not be set aside: {error}")
            return
        if count:
            console.say(f"set aside  {count} evaluations of later checkpoints")

    def missing(self) -> bool:
        """Whether the run's metrics.jsonl has none of a checkpoint of now; asked by all ranks."""
        found = False
        if self._recorder is not None:
            path = self._recorder.run.path / "checkpoints" / kimg_name(self._state.images)
            found = evaluated(path)
        return not self._state.ranks.share(found)

    def evaluate(self, bar: console.Bar | None, caught: Sequence[int]) -> None:
        """Save a checkpoint of now, and measure it; what fails is a warning. Of all ranks.

        Args:
            bar: of the training, which shows how far it is.
            caught: signals; one of them ends the evaluation.
        """
        ranks = self._state.ranks
        if self._recorder is not None:
            self._of_now(self._recorder, bar, lambda: caught[0] if caught else ranks.orphaned)
        ranks.barrier()  # on the CPU: no GPU waits at the next step for minutes

    def _of_now(self, recorder: Recorder, bar: console.Bar | None, stopping: Stopping) -> None:
        state = self._state
        path = recorder.run.path / "checkpoints" / kimg_name(state.images)
        again = f"fastgan evaluate {shlex.quote(str(path))} does it"
        try:
            recorder.save_now()
        except RunError as error:
            console.warn(f"{error}; it was not evaluated, and training goes on")
            return
        watched = _Watched(bar, stopping)
        try:
            watched.look()
            with console.hushed(), _untouched(state.device):
                record, best = evaluate_by(self._command(str(path)), self._real(), watched)
        except _Stopped:
            console.say(f"{path.name} was not evaluated: {said(stopping())}; {again}")
        except Exception as error:  # whatever it is, the run is worth more
            console.warn(f"{path.name} was not evaluated ({first_line(error)}); {again}")
        else:
            console.say(_line(record, state.images, best))
        finally:
            watched.end()

    def _command(self, checkpoint: str) -> EvaluateCommand:
        config = self._state.config
        return EvaluateCommand(
            what=checkpoint,
            count=config.eval_count,
            metrics=config.eval_metrics,
            device="cuda" if self._state.device.type == "cuda" else "cpu",
        )

    def _real(self) -> Cache:
        data = self._state.data
        assert isinstance(data, Cache)  # `check_metrics` has seen to it
        return data


class _Watched:
    """Shows an evaluation's work in the bar of the training, or in one of its own once that is
    done; and ends it when the run is to stop.
    """

    def __init__(self, bar: console.Bar | None, stopping: Stopping) -> None:
        self._training, self._stopping = bar, stopping
        self._note = bar.note if bar is not None else ""
        self._bar = bar or console.Bar("evaluating", 100, "%")
        self._total = 0.0

    def __call__(self, total: float) -> Self:
        """Before `update`: the seconds that the work may last."""
        self._total = total
        return self

    def look(self) -> None:
        if self._stopping():
            raise _Stopped

    def update(self, done: float, note: str) -> None:
        """How many of these seconds are done."""
        self.look()
        percent, metric = 100 * done / max(self._total, 1e-9), note.partition(":")[0]
        if self._training is None:
            self._bar.update(percent, metric)
        else:
            self._bar.update(self._bar.done, f"evaluating {percent:.0f}%, {metric}")

    def end(self) -> None:
        if self._training is None:
            self._bar.close()
        else:
            self._bar.update(self._bar.done, self._note)


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Around what is no training: random numbers go on as if it had not been, cuDNN does not search
    for the fastest algorithm (so that the numbers are those of `fastgan evaluate`), and a GPU's
    memory is given back.
    """
    cudnn, on_gpu = torch.backends.cudnn, device.type == "cuda"
    searches, cudnn.benchmark = cudnn.benchmark, False
    try:
        with torch.random.fork_rng([device] if on_gpu else []):
            yield
    finally:
        cudnn.benchmark = searches
        if on_gpu:
            torch.cuda.empty_cache()


def _line(record: dict[str, Any], images: int, best: str) -> str:
    """What an evaluation found, in a line."""
    rows = {row["role"]: row for row in record["rows"]}
    parts = []
    for measure in MEASURES:
        value, real = (value_at(rows.get(role), measure.at) for role in ("model", "real"))
        if value is None:
            continue
        beside = next((word for key, word in BESIDE.items() if key in measure.at), None)
        note = f" ({beside} {measure.form.format(real)})" if beside and real is not None else ""
        parts.append(f"{measure.title} {measure.form.format(value)}{note}")
    told = rows["model"].get("d_accuracy")
    if told:
        parts.append(f"D right of {told['real']:.0%} real, {told['fake']:.0%} generated")
    line = f"evaluated {images / 1000:7.1f} kimg: {', '.join(parts)}"
    return f"{line}; best: {best}" if best else line
