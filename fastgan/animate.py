"""`fastgan animate`: a run's sample grids, in the order of training, as a film."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

from . import console
from .commands import AnimateCommand
from .data.image_file import open_regular
from .errors import RunError, UsageError
from .films import MAX_SIDE, film_file, magnification, magnified, write_film
from .run_files import read_run

NAME = "training.webp"
STRIP, TEXT = 32, 20  # pixels below the grid, and of what is written there

Grids = list[tuple[float, Path]]  # by thousands of images


def animate(command: AnimateCommand) -> None:
    """`fastgan animate`: a film of a run's grids, the thousands of images written below each.

    Raises:
        UsageError: RUN is no run, or one with less than two grids.
        RunError: the film cannot be written.
    """
    run = read_run(command.run)
    target = film_file(command.out or run.path / NAME, "--out", command.fps)
    grids, sides = _whole(run.grids)
    if len(grids) < 2:
        raise UsageError(
            f"{run.path}: a film needs two sample grids or more, and samples/ has {len(grids)} "
            "(fastgan train --sample-kimg says how often one is written)"
        )
    shown = _fitted(sides)
    times = magnification(shown, command.scale, STRIP)
    frames = (_frame(kimg, path, shown, times) for kimg, path in grids)
    write_film(frames, target, len(grids), command.fps, command.hold)
    smaller = f", made smaller from {sides[0]:,}x{sides[1]:,}" if shown != sides else ""
    console.say(
        f"{target}: {len(grids):,} grids from {grids[0][0]:,.7g} to {grids[-1][0]:,.7g} kimg, "
        f"{shown[0] * times:,}x{shown[1] * times + STRIP:,} px{smaller}, "
        f"{target.stat().st_size / 1e6:.2f} MB"
    )


def _whole(grids: Grids) -> tuple[Grids, tuple[int, int]]:
    """The grids that can be read and have the size that most of them have (of two sizes as common
    the later one), and that size; what is passed over is named.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    for _, path in grids:
        found = _read(path)
        if isinstance(found, str):
            console.warn(f"{path.name} {found}: passed over")
        else:
            sizes[path] = found.size
    if not sizes:
        return [], (0, 0)
    (usual, _), *_ = Counter(reversed(sizes.values())).most_common(1)
    for path, size in sizes.items():
        if size != usual:
            console.warn(
                f"{path.name} is of {size[0]}x{size[1]} px, most are of {usual[0]}x{usual[1]}: "
                "passed over"
            )
    return [(kimg, path) for kimg, path in grids if sizes.get(path) == usual], usual


def _read(path: Path) -> Image.Image | str:
    """A grid, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_regular(path) as content, Image.open(content, formats=["PNG"]) as file:
                return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, MemoryError) as error:
        return f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"


def _fitted(sides: tuple[int, int]) -> tuple[int, int]:
    """As large as a film with the strip may be, in the same proportions."""
    less = min(1.0, (MAX_SIDE - STRIP) / max(*sides, 1))
    return max(1, int(sides[0] * less)), max(1, int(sides[1] * less))


def _frame(kimg: float, path: Path, sides: tuple[int, int], times: int) -> Image.Image:
    found = _read(path)
    if isinstance(found, str):  # it was whole a moment ago
        raise RunError(f"{path} {found}")
    picture = magnified(found.resize(sides, Image.Resampling.LANCZOS), times)
    frame = Image.new("RGB", (picture.width, picture.height + STRIP), "white")
    frame.paste(picture)
    text = f"{kimg:,.7g} kimg"
    ImageDraw.Draw(frame).text((8, picture.height + 4), text, fill="black", font_size=TEXT)
    return frame
