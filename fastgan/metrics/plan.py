"""What `fastgan evaluate` is asked: of which images, against which, by what, written where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..commands import EvaluateCommand
from ..config import Metric
from ..console import say, warn
from ..data.cache import IMAGES, Cache
from ..data.prepare import default_root, prepare
from ..errors import UsageError
from ..modes import pick_device
from ..paths import make_folder
from . import c2st, inception
from .records import RECORDS
from .sources import Pictures, Source, Trained, is_run, open_source, resolved

# of what none is named for; swd_mmagic only where it is asked for
ALL: tuple[Metric, ...] = ("swd", "ms_ssim", "c2st", "d_accuracy", "nearest", "inception")
FEWEST = {"c2st": c2st.FEWEST, "inception": inception.FEWEST}  # images of each set; of others 2
HELD_OUT = 512  # images held out from which C2ST takes its real ones from them
WHAT = "WHAT"  # the argument, in messages


class Plan:
    """A command, checked before anything is decoded.

    Attributes:
        what, others: what is evaluated, and what beside it.
        run: the run folder that it is of.
        out: the file that gets the record.
        metrics, weights: what is measured, and Inception's weights.
    """

    def __init__(self, command: EvaluateCommand) -> None:
        self.command = command
        self.device = pick_device(command.device)
        self.what = open_source(command.what, WHAT, command.ema, self.device)
        self.others = [
            open_source(other, "--against", command.ema, self.device) for other in command.against
        ]
        self.others = [_told_apart(other, [self.what, *self.others]) for other in self.others]
        flags = {key: getattr(command, key) for key in ("size", "crop", "filter", "holdout")}
        changed = {key: value for key, value in flags.items() if value is not None}
        self.source, self.options, root = resolved(self.what, command.data, changed)
        self.root = root or default_root()
        self.run = self.what.run if isinstance(self.what, Trained) else None
        self.out = self._out()
        self.metrics, self.weights = self._metrics()

    @property
    def picture(self) -> Path:
        """Where the nearest neighbours are shown."""
        in_run = self.command.out is None and self.run is not None
        return self.out.with_name("nearest.png" if in_run else f"{self.out.stem}-nearest.png")

    def _out(self) -> Path:
        """Where the record goes; found unfit now, not after minutes of work."""
        out = self.command.out or (self.run or Path()) / RECORDS
        named = "--out" if self.command.out else f"{out}: --out FILE names another place, which"
        if out.exists() and not out.is_file():
            kind = "folder" if out.is_dir() else "device or pipe"
            raise UsageError(f"{named} must be a file, got the {kind} {out}")
        if out.suffix.lower() != ".jsonl":
            raise UsageError(f"--out must end in .jsonl, got {out}")
        if self.command.out is None and self.run is None and is_run(Path.cwd()):
            raise UsageError(
                f"--out must name the file for the record: the current folder is a run, whose "
                f"{RECORDS} is of its own checkpoints"
            )
        make_folder(out.parent, named)
        return out

    def _metrics(self) -> tuple[list[str], Path | None]:
        named = self.command.metrics
        asked: list[str] = list(dict.fromkeys(named or ALL))
        has_d = isinstance(self.what, Trained) and self.what.checkpoint is not None
        if "d_accuracy" in asked and not has_d:
            if named:
                raise UsageError(
                    f"--metrics d_accuracy needs a run: {self.what.name} comes without a D"
                )
            asked.remove("d_accuracy")
        if "inception" not in asked:
            if self.command.inception is not None:
                raise UsageError("--inception needs inception among --metrics, or none named")
            return asked, None
        weights = inception.find(self.command.inception)
        if weights is None:
            if named:
                raise UsageError(f"--metrics inception: {inception.MISSING}")
            say(f"inception  {inception.MISSING}")
            asked.remove("inception")
        else:
            inception.require_library("--metrics")  # before anything is decoded
        return asked, weights


def _told_apart(other: Source, among: list[Source]) -> Source:
    """A source of --against, with the folder that its run is in where another has its name, too:
    runs of other folders are counted from 00000 as well.
    """
    if [source.name for source in among].count(other.name) < 2 or not isinstance(other, Trained):
        return other
    return replace(other, name=f"{other.name} ({(other.run or other.path).parent.name})")


class Sets:
    """The real images, and the pictures among what is evaluated, decoded.

    Attributes:
        count: images of each set that are compared.
        own: whether the real images are those that the checkpoint has learned from.
        sets: the sources in order, each with its images where it is no generator.
    """

    def __init__(self, plan: Plan, real: Cache | None = None) -> None:
        """`real`: the real images that the plan names, where they are open already."""
        self._plan = plan
        self.cache = real or prepare(plan.source, plan.options, root=plan.root)
        self.own = self._is_own()
        self.sets = [self._opened(source) for source in (plan.what, *plan.others)]
        self.count, why = self._counted()
        say(f"sets       {self.count:,} images each: {why}{self._c2st_reals()}")
        if plan.weights and self.count < inception.SUBSET:
            say(f"inception  {inception.NO_KID}")

    @property
    def held_out(self) -> bool:
        """Whether C2ST takes its real images from those held out."""
        return len(self.cache.held_out) >= HELD_OUT

    def about(self) -> dict[str, Any]:
        """All that the results of baselines depend on."""
        return {
            "pixels": self.cache.meta.sha256[IMAGES],
            "images": len(self.cache.images),
            "held_out": len(self.cache.held_out),
            "size": self.cache.meta.size,
            "count": self.count,
            "seed": self._plan.command.seed,
        }

    def _is_own(self) -> bool:
        what = self._plan.what
        found = what.checkpoint if isinstance(what, Trained) else None
        was = found.meta["data"].get("identity") if found else None
        if was is not None and was != self.cache.identity and self._plan.command.data is None:
            warn(f"{self._plan.source} is not what the run learned from: files or options changed")
        return was == self.cache.identity

    def _opened(self, source: Source) -> tuple[Source, Cache | None]:
        size = self._plan.options.size
        if isinstance(source, Pictures):
            return source, source.prepare(self._plan.options, self._plan.root)
        if source.generator.size != size:
            raise UsageError(
                f"--against {source.name} makes images of {source.generator.size} px, and {size} "
                "px are compared: write them as files (fastgan sample --each), which are resized"
            )
        return source, None

    def _counted(self) -> tuple[int, str]:
        """How many images of each set are compared, and why."""
        wish = self._plan.command.count
        most = {"--count": wish, **halves(len(self.cache.images))}
        for source, pictures in self.sets:
            if pictures is not None:
                most[f"all of {source.name}"] = len(pictures.images)
        count, why = enough(most, self._plan.metrics, "--metrics")
        return count, why if count == wish else f"{why} (--count {wish:,} is more)"

    def _c2st_reals(self) -> str:
        held = len(self.cache.held_out)
        if "c2st" not in self._plan.metrics or not held:
            return ""
        if not self.held_out:
            return f"; {held:,} held out are too few for C2ST, which takes {HELD_OUT} or more"
        return f"; C2ST by {held:,} held out"


def halves(every: int) -> dict[str, int]:
    """How many of so many real images can be compared, by why."""
    return {f"half of the {every:,}, the other half is the floor": every // 2}


def enough(most: Mapping[str, int], metrics: Sequence[str], flag: str) -> tuple[int, str]:
    """How many images of each set are compared, the fewest of `most`, and why.

    Raises:
        UsageError: too few for one of the metrics, which the user names by `flag`.
    """
    why = min(most, key=most.__getitem__)
    count = most[why]
    for metric in metrics:
        if count < (least := FEWEST.get(metric, 2)):
            do = [other for other in metrics if FEWEST.get(other, 2) <= count]
            hint = f"; {flag} {' '.join(do)} can do with them" if do else ""
            raise UsageError(
                f"{flag} {metric} needs {least} images or more of each set, and there are {count} "
                f"({why}){hint}"
            )
    return count, why
