"""Curves of a run as SVG that stands in a page: its text is text, its colours are the page's.

matplotlib draws in stand-in colours, each of which becomes a CSS variable: so one drawing is right
on light and on dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

POINTS = 500  # at most; of more ticks the means of several
FEW = 3  # points that need a mark each to be seen
SIZE = (4.9, 2.7)  # inches of 72 units: on a phone a unit is a pixel, and so 10 units can be read
MARGINS = {"left": 0.15, "right": 0.955, "bottom": 0.185, "top": 0.97}
STAND_INS = {
    "--ink": "#0a0b01",
    "--soft": "#0a0b02",
    "--rule": "#0a0b03",
    "--first": "#0a0b04",
    "--second": "#0a0b05",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastgan",
    "font.size": 10,
    "axes.labelsize": 10,
    "text.color": STAND_INS["--ink"],
    "axes.labelcolor": STAND_INS["--soft"],
    "xtick.color": STAND_INS["--soft"],
    "ytick.color": STAND_INS["--soft"],
    "axes.edgecolor": STAND_INS["--rule"],
    "grid.color": STAND_INS["--rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
}
WITHOUT = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata: the same bytes each time


@dataclass(frozen=True)
class Chart:
    """Attributes:
    lines: keys of stats.jsonl, with their names.
    top: of the y axis, which begins at 0; None: what the numbers need.
    level: where a dashed line is.
    unit: what values are divided by.
    """

    name: str
    title: str
    lines: tuple[tuple[str, str], ...]
    top: float | None = None
    level: float | None = None
    unit: float = 1


CHARTS = (
    Chart("loss", "Loss", (("g_loss", "G"), ("d_loss", "D"))),
    Chart(
        "belief",
        "What D takes for real: at 0.5 it cannot tell",
        (("d_fake", "D(G(z)), generated"), ("d_real", "D(x), real")),  # G's colour, and D's
        top=1,
        level=0.5,
    ),
    Chart("speed", "Images a second", (("img_per_s", "img/s"),)),
    Chart("memory", "GPU memory at its peak, GiB", (("gpu_memory_bytes", "peak"),), unit=2**30),
    Chart("diversity", "Diversity of samples: near 0 they are alike", (("diversity", ""),)),
)
DISTANCES = Chart(
    "swd",
    "SWD: lower is nearer, and real images are the floor",
    (("swd", "this run"), ("floor", "real images")),
)


def svg(chart: Chart, rows: Sequence[Mapping[str, Any]]) -> str:
    """The chart as an <svg> element; "" where the rows have no number for it."""
    curves = [
        (label, STAND_INS[colour], *_points(rows, key, chart.unit))
        for (key, label), colour in zip(chart.lines, ("--first", "--second"), strict=False)
    ]
    curves = [curve for curve in curves if len(curve[2])]
    if not curves:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(**MARGINS)  # its own layouts would double the time
        axes = figure.subplots()
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        if chart.level is not None:
            axes.axhline(chart.level, color=STAND_INS["--ink"], linewidth=1, linestyle="--")
        for label, colour, x, y in curves:
            mark = "o" if len(x) <= FEW else ""
            axes.plot(x, y, label=label, color=colour, linewidth=1.6, marker=mark)
        axes.set_xlabel("thousands of images")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.6g}")
        top = chart.top or 1.05 * max(y.max() for *_, y in curves) or 1
        axes.set_ylim(-0.02 * top, 1.02 * top)  # on the border a curve would be cut in half
        if len(chart.lines) > 1:
            figure.subplots_adjust(top=0.88)
            figure.legend(loc="upper left", ncols=2, borderpad=0.1, handlelength=1.4)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata=WITHOUT)
    return _in_page(content.getvalue(), chart)


def _points(
    rows: Sequence[Mapping[str, Any]], key: str, unit: float
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["kimg"], row[key]) for row in rows if row.get(key) is not None]
    table: np.ndarray = np.array(pairs, np.float64).reshape(-1, 2)
    if len(table) > POINTS:
        table = np.array([part.mean(0) for part in np.array_split(table, POINTS)])
    return table[:, 0], table[:, 1] / unit


def _in_page(text: str, chart: Chart) -> str:
    """A document of matplotlib's as one element of several in a page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{chart.name}-", text)
    for name, stand_in in STAND_INS.items():
        text = text.replace(stand_in, f"var({name})")
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" @>', text, count=1)
    label = f'role="img" aria-label="{chart.title}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return text.replace("@", label, 1).strip()
